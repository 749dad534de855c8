"""`python -m securerun`: the same as the command securerun."""

from securerun import aside

if __name__ == "__main__":
    aside.put_working_directory()

    from securerun.run import command

    command()
