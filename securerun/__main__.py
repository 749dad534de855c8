"""`python -m securerun`: the same as the command securerun."""

from securerun.run import command

if __name__ == "__main__":
    command()
