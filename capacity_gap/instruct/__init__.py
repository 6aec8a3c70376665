"""From a distilled student to one that answers: conversations, supervised fine-tuning, preferences, exact match."""
