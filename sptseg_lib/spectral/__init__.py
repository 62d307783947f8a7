"""The spectral parts: prompts, high and low heads, frequency bands. They import torch alone."""
