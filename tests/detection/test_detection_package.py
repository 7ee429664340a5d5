import subprocess
import sys

import detection


def test_importing_detection_loads_neither_torch_nor_scipy_stats_nor_fedsim():
    code = "import sys, detection; print([m for m in ('torch', 'fedsim', 'ray', 'scipy.stats', 'scipy.optimize', 'matplotlib', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_public_list_has_no_name_twice_and_all_are_documented():
    assert len(set(detection.__all__)) == len(detection.__all__)
    for name in detection.__all__:
        assert getattr(detection, name).__doc__


def test_examples_in_docstrings_run():
    import doctest
    import importlib
    import pkgutil

    examples = 0
    for module in pkgutil.iter_modules(detection.__path__, "detection."):
        result = doctest.testmod(
            importlib.import_module(module.name), extraglobs={"np": __import__("numpy"), "Gaussian": detection.Gaussian}
        )
        assert result.failed == 0
        examples += result.attempted
    assert examples >= 6
