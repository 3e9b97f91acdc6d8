"""The search for a plan: sensitivities of Linears, an allocation of schemes, plans measured."""
