"""The fused mathematics: tensor functions and autograd functions, each beside its plain reference."""
