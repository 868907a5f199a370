class Failure(Exception):
    """Ends a command with one line on standard error and an exit status; what was wrong is not a bug of kbatch's."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


#: Exit status when the command line, a file or a setting is wrong and nothing was tried.
USAGE = 2
