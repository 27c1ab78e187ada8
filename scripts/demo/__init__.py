"""How the bundled demo is made: its dialogues, its training, its measurement."""
