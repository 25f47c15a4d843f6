"""What tests of projects, flows and sources need: flow runs in memory, small real projects, the contract of sources.

Only tests import it; it may import anything but ``cli``. It runs in the process of the tests.
"""
