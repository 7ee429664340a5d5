"""Studies that measure what fedsim claims; run from a checkout."""
