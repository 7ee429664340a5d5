"""Speed, measured side by side on one core; each module is a command and, like a study, part of ``python -m experiments.claims``."""
