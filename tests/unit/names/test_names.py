"""What `import cortex` gives: quick, complete, and as docs/components.md says."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cortex
from cortex.components import with_table
from cortex.names import HOMES
from tests.architecture.sources import ROOT
from tests.doctests import run_examples

CONTRACT = ["TenzroBridge", "TenzroProtocol", "NodeDiscoveryService", "CortexModel", "ModelTrainer", "WeightAggregator"]
CONTRACT += ["JobCoordinator", "ModelDeploymentManager", "BatchProcessor", "EncryptionManager", "WeightCompressor"]
CONTRACT += ["ValidationManager", "CortexManager"]
COMPLETE = ["TenzroProtocol", "NodeDiscoveryService", "CortexModel", "ModelTrainer", "EncryptionManager"]
COMPLETE += ["WeightCompressor", "ValidationManager"]
MEASURE = """
import sys, time
began = time.process_time()
import cortex
took = time.process_time() - began
heavy = [name for name in ("torch", "grpc", "numpy", "pydantic", "services") if name in sys.modules]
print(took, *heavy)
"""


@pytest.mark.parametrize("name", CONTRACT)
def test_every_name_of_the_contract_is_there_and_documented_by_an_example(name: str) -> None:
    found = getattr(cortex, name)
    assert found.__name__ == name
    assert ">>> " in found.__doc__
    assert name in cortex.__all__


def test_all_public_names_have_a_home() -> None:
    assert {*HOMES, "__version__"} == set(cortex.__all__)
    for name in HOMES:
        assert getattr(cortex, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Tenzro'"):
        _ = cortex.Tenzro


def test_importing_the_package_is_quick_and_brings_nothing_heavy() -> None:
    runs = [subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True) for _ in "123"]
    results = [run.stdout.split() for run in runs]
    assert all(len(result) == 1 for result in results), results
    assert min(float(result[0]) for result in results) <= 0.3


def test_the_components_document_is_made_from_the_classes() -> None:
    document = (ROOT / "docs" / "components.md").read_text()
    assert with_table(document) == document, "run python -m cortex.components docs/components.md"


@pytest.mark.parametrize("name", COMPLETE)
async def test_its_example_works_as_it_stands(name: str) -> None:
    assert await run_examples(getattr(cortex, name), {}) >= 5
