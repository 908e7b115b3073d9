"""What is particular to each family of models, one module for each; the rest of the house asks and names none."""
