"""python -m coeft.cli"""

from .main import entry

if __name__ == "__main__":  # worker processes of a sweep import this file too
    entry()
