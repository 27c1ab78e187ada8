"""A chunk of new tokens for each row: prompts, guesses and forced tokens."""
