"""Taking measurements: what a model under a plan costs, what it loses, and which plan is best."""
