"""The run directory: what is stored (``store``), read back (``run``), scored (``scores``), drawn (``plots``) and told (``report``).

Import from those modules; nothing is imported here, so the command line can answer ``--help`` without NumPy.
"""
