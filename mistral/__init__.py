"""Mistral-7B, written by hand in plain PyTorch."""

from mistral.checkpoints.load import load
from mistral.config import Config
from mistral.engine.decoder import Decoder
from mistral.engine.generation import Token, generate, generate_batch, generate_naive
from mistral.engine.speculation import LookupDecoder
from mistral.engine.text import generate_text
from mistral.errors import CheckpointError, MistralError, NotEnoughMemory
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "Config",
    "Decoder",
    "LookupDecoder",
    "Mistral",
    "MistralError",
    "NotEnoughMemory",
    "Sampling",
    "Token",
    "Tokenizer",
    "generate",
    "generate_batch",
    "generate_naive",
    "generate_text",
    "load",
]
