"""The parts of scripts/chat.py."""
