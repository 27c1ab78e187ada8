"""Mistral-7B, written by hand in plain PyTorch."""

from mistral.checkpoints.load import load
from mistral.checkpoints.saving import export_gguf, save
from mistral.config import Config, RotaryScaling
from mistral.engine.base import Constraint, Engine
from mistral.engine.decoder import Decoder
from mistral.engine.generation import generate, generate_batch, generate_naive
from mistral.engine.ids import unpadded
from mistral.engine.loop import Token
from mistral.engine.speculation import LookupDecoder
from mistral.engine.text import generate_batch_text, generate_text, stream_batch_text
from mistral.errors import CheckpointError, MistralError, NotEnoughMemory
from mistral.model import Mistral
from mistral.sampling import Sampling
from mistral.tokenizer import Tokenizer

__all__ = [
    "CheckpointError",
    "Config",
    "Constraint",
    "Decoder",
    "Engine",
    "LookupDecoder",
    "Mistral",
    "MistralError",
    "NotEnoughMemory",
    "RotaryScaling",
    "Sampling",
    "Token",
    "Tokenizer",
    "export_gguf",
    "generate",
    "generate_batch",
    "generate_batch_text",
    "generate_naive",
    "generate_text",
    "load",
    "save",
    "stream_batch_text",
    "unpadded",
]
