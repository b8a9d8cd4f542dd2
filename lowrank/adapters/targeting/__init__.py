"""Which modules and parameters of a model a config names, and where an adapter would act on nothing."""
