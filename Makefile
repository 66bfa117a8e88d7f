# make demo   run the demonstration (results in out/)      make test   lint, type check, tests
# make slow   the sweeps over transformers and timm        make bench  the CPU benchmarks
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint slow bench clean

$(VENV)/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip -c constraints.txt
	$(BIN)/pip install -q -c constraints.txt torch triton setuptools
	$(BIN)/pip install -q -c constraints.txt -e ".[demo,test]"
	touch $@

demo: $(VENV)/done
	$(BIN)/python bench/demo.py

lint: $(VENV)/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/typecheck.py

test: lint
	$(BIN)/python -m pytest -n 2

# timm wants torchvision, which has no CPU build for this torch; without its dependencies it imports
# behind the shim of tests/zoo
$(VENV)/slow: $(VENV)/done
	$(BIN)/pip install -q --no-deps -c constraints.txt timm torchvision
	touch $@

slow: $(VENV)/slow
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/done
	$(BIN)/python bench/overhead.py

clean:
	rm -rf $(VENV) build dist *.egg-info out
