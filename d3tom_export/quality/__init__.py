"""How good answers are: questions with known answers, scores, and what of their differences is more than chance."""
