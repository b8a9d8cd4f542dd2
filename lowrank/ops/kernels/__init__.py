"""Triton kernels for CUDA cards: the functions of the room above in one launch each. `on_card` says where they run;
nothing else imports the others, which import Triton."""
