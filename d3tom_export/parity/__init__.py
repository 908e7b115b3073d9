"""What parity rests on: bounds that follow from a precision, prompts that probe what samples leave out, and sources."""
