"""One study a module: ``run(quick, out) -> list[Claim]`` prints its tables and writes its figures under ``out``."""
