"""The bundled demo: a small Mistral in one GGUF file, trained by `scripts/demo/`."""
