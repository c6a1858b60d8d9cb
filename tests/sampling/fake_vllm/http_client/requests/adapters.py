class HTTPAdapter:
    def __init__(self, **given):
        pass
