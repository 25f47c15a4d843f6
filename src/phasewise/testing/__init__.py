"""What tests of projects, flows and sources need: flow runs in memory, small real projects, the contract of sources.

For tests alone; it may import anything but ``cli``. It runs in the process of the tests.
"""
