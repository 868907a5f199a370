class MockClusterError(RuntimeError):
    """A call to the mock cluster failed. `code` and `name` are librdkafka's, None when it was not the one to refuse."""

    def __init__(self, message: str, code: int | None = None, name: str | None = None) -> None:
        super().__init__(message, code, name)
        self.code = code
        self.name = name

    def __str__(self) -> str:
        return str(self.args[0])
