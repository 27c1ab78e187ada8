"""The bundled demo: a small Mistral in one GGUF file. `scripts/demo/` makes it."""
