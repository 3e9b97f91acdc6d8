"""Plans: rules that give each Linear its scheme, laid over a model and carried out."""
