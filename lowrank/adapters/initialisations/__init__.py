"""How the factors start: `init_lora_weights`, one file for each idea."""
