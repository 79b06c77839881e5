"""NeMo-Run recipes: one module per model, and what submits them; README.md tells how they are used."""
