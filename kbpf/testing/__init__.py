"""Help for tests of BPF programs: a pytest plugin with fixtures for both backends, requirements and leak checks.

Say ``pytest_plugins = ["kbpf.testing.plugin"]`` in the top ``conftest.py``, or ``pytest -p kbpf.testing.plugin``.
"""
