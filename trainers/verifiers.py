from typing import NamedTuple


class Verdict(NamedTuple):
    reward: float
    feedback: str = ""
    failure: str = ""


def exact(response, reference):
    got = response.rsplit("####", 1)[-1].strip()
    return Verdict(float(got == str(reference)), "" if got == str(reference) else f"expected {reference}, got {got}")


def load_verifier(name):
    return exact


class VerifierPool:
    def __init__(self, workers, timeout):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *a):
        pass

    def __call__(self, names, responses, references):
        return [exact(a, b) for a, b in zip(responses, references)]
