"""PEFT's own test suite, run with NB-LoRA in place of another method; see README.md here."""
