"""Files to (model, tokenizer)."""
