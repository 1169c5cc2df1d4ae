"""python -m coeft.cli"""

from .main import entry

entry()
