"""A whole data set made ready: on every core, remembered, with what could not be used counted."""
