"""A package only so that one config can start from another: `from config.xl2_256 import *`."""
