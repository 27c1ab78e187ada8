"""The bundled demo: a small Mistral in one GGUF file, and how it is made."""
