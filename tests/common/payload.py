"""What a pickle may hold besides data."""


class Payload:
    """Unpickled, it calls function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call
