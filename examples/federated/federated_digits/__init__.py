"""Federated NB-LoRA on rotated digits: a Flower app."""
