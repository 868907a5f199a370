from kbatch._errors import KbatchError


class MockClusterError(KbatchError, RuntimeError):
    """A call to the mock cluster failed.

    Attributes:
        code: librdkafka's error code; ``None`` when it was not librdkafka that refused.
        name: Its name, such as ``"TOPIC_ALREADY_EXISTS"``.
    """

    def __init__(self, message: str, code: int | None = None, name: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.name = name
