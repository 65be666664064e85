"""Mutation testing of the runtime by the simulator's scenarios; see ci/mutants.

A mutation is a patch with a header of `# key: value` lines: which defence it breaks and why a scenario should notice.
`likely` names scenarios to ask first, `equivalent` argues that no run can tell the mutation from the original, `survives` says why none did. Results are lines of
JSON, the last one of a name counts, and only while the patch is the one that it was.
"""

import argparse, concurrent.futures, fnmatch, hashlib, json, os, pathlib, random, re, resource, shutil, signal, subprocess, sys, threading, time, tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATCHES = ROOT / "tests/mutants"
RESULTS = PATCHES / "results.jsonl"
PAGE = ROOT / "docs/mutants.md"
TARGET = pathlib.Path(os.environ["CARGO_TARGET_DIR"])
# Where the defences are. What only decodes, draws, prints or measures is left out, and the simulated services are.
DEFENCES = [
    "runtime/core/src/streaming/{checkpoint,click_task,commit,dedup,event,job,merge_task,pane,watermark,window}.rs",
    "runtime/core/src/batch/{mod,publish,raw,transform}.rs",
    "runtime/core/src/orchestrator/source.rs",
    "runtime/core/src/platform.rs",
    "runtime/lakehouse/src/{commit,lib}.rs",
    "runtime/log/src/client.rs",
]
SWEEPS = [["sweep", "--seeds", "20"], ["sweep", "--world", "stream", "--seeds", "6"]]
# What one run may take, many times what any does: a run without an end, one that waits for ever and one that eats all memory are
# noticed, too, and a busy machine breaks nothing.
RUN_CPU_S = 180
RUN_WALL_S = 900
RUN_BYTES = 8 << 30
# How many of the suite are asked about each mutation before any is asked about by all.
LIKELY = 8
# Variable that names the one mutation that is on, in a program that has many.
SWITCH = "MUTATION_ON"
# Where a mutation can show. What stands in neither list runs in both worlds.
STREAM_ONLY = ("runtime/core/src/streaming/", "runtime/core/src/avro/", "runtime/log/")
BATCH_ONLY = ("runtime/core/src/batch/", "runtime/core/src/orchestrator/", "runtime/core/src/dimensions/", "runtime/lakehouse/")


def say(text):
    print(text, flush=True)


def header(text):
    return dict(re.findall(r"^# ([a-z ]+): (.*)$", text.split("\n--- ", 1)[0], re.M))


def files_of(patch):
    return re.findall(r"^--- a/(\S+)", patch, re.M)


def load_patches():
    return {p.stem: p.read_text() for p in sorted(PATCHES.glob("*.patch"))}


def digest(text):
    """Of the change alone: what the header says may change."""
    return hashlib.sha256(text[text.index("--- ") :].encode()).hexdigest()[:16]


def load_results():
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def keep(result):
    with RESULTS.open("a") as out:
        out.write(json.dumps(result, sort_keys=True) + "\n")


def tracked():
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [n for n in names if n and (ROOT / n).is_file()]


def put(path, content):
    """Writes what differs, so that a build sees as changed only what is."""
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def copy_tree(tree, changed={}):
    """The tree as it is, but for what is changed."""
    names = tracked()
    for name in names:
        put(tree / name, changed.get(name) or (ROOT / name).read_bytes())
        shutil.copymode(ROOT / name, tree / name)
    known = set(names)
    for path in [p for p in tree.rglob("*") if p.is_file() and str(p.relative_to(tree)) not in known]:
        path.unlink()


def seed_target(target):
    """Dependencies come from the present target directory; what is of this workspace is built anew for its own path."""
    if (target / "debug/.fingerprint").exists():
        return
    say(f"seeding {target} with the dependencies that are built")
    for folder in ["build", ".fingerprint"]:
        if (TARGET / "debug" / folder).exists():
            command = ["cp", "-a", "--reflink=auto", TARGET / "debug" / folder, target / "debug"]
            (target / "debug").mkdir(parents=True, exist_ok=True)
            subprocess.run(command, check=True)
    (target / "debug/deps").mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(TARGET / "debug/deps") if (TARGET / "debug/deps").exists() else []:
        if entry.name.endswith((".rlib", ".rmeta", ".so", ".d")) and "simulacro" not in entry.name:
            shutil.copy2(entry.path, target / "debug/deps" / entry.name)
    if (TARGET / "CACHEDIR.TAG").exists():
        shutil.copy2(TARGET / "CACHEDIR.TAG", target)
    for name in [".rustc_info.json"]:
        if (TARGET / name).exists():
            shutil.copy2(TARGET / name, target)


def limit():
    resource.setrlimit(resource.RLIMIT_CPU, (RUN_CPU_S, RUN_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (RUN_BYTES, RUN_BYTES))


def run(command, cwd, limited=False, on=""):
    """Runs a command in a process group of its own, with a mutation on: exit code and what it said. Limits are those of each of
    its processes."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, SWITCH: on},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=limit if limited else None,
    )
    # A build, and a run without a mutation, go to their end.
    running = RUNNING if on else KEPT
    running.add(process.pid)
    try:
        said, _ = process.communicate(timeout=RUN_WALL_S if limited else None)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return -signal.SIGKILL, f"error: no end after {RUN_WALL_S} s"
    finally:
        running.discard(process.pid)


# Process groups to end when this is told to end: those that nobody waits for once a mutation is killed, and the others.
RUNNING = set()
KEPT = set()


def end(signum, frame):
    for group in list(RUNNING | KEPT):
        os.killpg(group, signal.SIGKILL)
    os._exit(128 + signum)


class Bench:
    def __init__(self, work, jobs):
        self.tree, self.target, self.jobs = work / "tree", work / "target", jobs
        # Seconds that each of the suite took without a mutation.
        self.noted = work / "costs.json"
        self.costs = json.loads(self.noted.read_text()) if self.noted.exists() else {}
        # What held without a mutation, and with which code; the program that has none, or has them all switched off.
        self.holds = work / "holds.json"
        self.held = json.loads(self.holds.read_text()) if self.holds.exists() else {}
        code = hashlib.sha256()
        for name in tracked():
            if name.startswith(("runtime/", "sim/", "contracts/", "Cargo")):
                code.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
        self.code, self.plain = code.digest(), None
        # Without debugging information: half of the time of an incremental build is linking it.
        os.environ.update(CARGO_TARGET_DIR=str(self.target), CARGO_PROFILE_DEV_DEBUG="0")

    def build(self):
        # `--workspace`: other features of the dependencies would build half of them again.
        command = ["cargo", "build", "--locked", "--workspace", "--bin", "simulacro-sim", "--message-format", "short"]
        code, said = run(command, self.tree)
        return None if code == 0 else said

    def scenarios(self):
        """Of tier pr, as paths."""
        names = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "scenarios").rglob("*.toml"))
        return [n for n in names if tomllib.loads((ROOT / n).read_text()).get("tier") == "pr"]

    def suite(self, patch, results):
        """Every scenario and sweep in whose world the lines run; those the patch names first, then what killed most in the same
        file, then what killed most, then what is quick."""
        changed = files_of(patch)
        in_stream = not all(file.startswith(BATCH_ONLY) for file in changed) or not changed
        in_batch = not all(file.startswith(STREAM_ONLY) for file in changed) or not changed
        likely = header(patch).get("likely", "").split()
        killed = [r for r in results.values() if r["outcome"] == "killed"]
        near = [r["killer"] for r in killed if r.get("file") in changed]
        killers = [r["killer"] for r in killed]
        stories = {n: tomllib.loads((ROOT / n).read_text()) for n in self.scenarios()}
        kind = {n: story.get("kind", "batch") for n, story in stories.items()}
        def can_notice(name):
            """No run of the other world comes by a line of the stream, or of what only a day's batch calls."""
            is_stream = kind[name] == "stream"
            return in_stream and (is_stream or "stream" in stories[name]) or in_batch and not is_stream
        def rank(name):
            return (name not in likely, -near.count(name), -killers.count(name), self.costs.get(name, 0), name)
        ordered = [n for n in sorted(kind, key=rank) if can_notice(n)]
        sweeps = [s for s in SWEEPS if (in_stream if "stream" in s else in_batch)]
        return [(n, ["run", n, "--jobs", "1"]) for n in ordered] + [(" ".join(s), s) for s in sweeps]

    def program(self, name):
        """The simulator that was built last, where the next build does not replace it."""
        kept = self.tree.parent / f"simulacro-sim-{name}"
        kept.unlink(missing_ok=True)
        shutil.copy2(self.target / "debug/simulacro-sim", kept)
        return kept

    def ask(self, sim, item, on):
        """One scenario or sweep with a mutation on: its first problem, or `None` when it holds."""
        name, arguments = item
        extra = ["--out", str(self.tree.parent / "failing")] if arguments[0] == "sweep" else []
        began = time.time()
        code, said = run([sim, *arguments, *extra], self.tree, limited=True, on=on)
        if code == 0:
            self.costs.setdefault(name, round(time.time() - began, 1))
            return None
        said = re.sub(r"(did not finish:)\n\s*", r"\1 ", said)
        lines = [l.strip() for l in said.splitlines() if re.match(r"\s+(invariant|liveness|alerts:|attempts:|held by:|broken invariants|.*expected)|error:", l)]
        return (lines or [l.strip() for l in said.splitlines() if l.strip()] or ["no word"])[0][:300]

    def must_hold(self, item):
        """What kills must hold without a mutation; otherwise it would kill every one. It is asked once for the same code."""
        name = item[0]
        own = (ROOT / name).read_bytes() if (ROOT / name).exists() else b""
        state = hashlib.sha256(self.code + own).hexdigest()
        if self.held.get(name) == state:
            return
        problem = self.ask(self.plain, item, "")
        if problem is not None:
            say(f"error: without any mutation {name} breaks: {problem}")
            end(1, None)
        self.held[name] = state
        self.holds.write_text(json.dumps(self.held, indent=1, sort_keys=True))
        self.noted.write_text(json.dumps(self.costs, indent=1, sort_keys=True))

    def judge(self, sim, suite, on):
        """The first of the suite that breaks with a mutation on, with its first problem; `None` when all hold."""
        over = threading.Event()
        def one(item):
            problem = self.ask(sim, item, on)
            if problem is None or over.is_set():
                return None
            self.must_hold(item)
            return item[0], problem
        waiting, running = list(suite), {}
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    item = waiting.pop(0)
                    running[pool.submit(one, item)] = item
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    running.pop(future)
                    if future.result() is not None:
                        # Nobody waits for what the others would say.
                        over.set()
                        for group in list(RUNNING):
                            os.killpg(group, signal.SIGKILL)
                        return future.result()
        return None


def result_of(name, patch):
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"name": name, "patch": digest(patch), "file": " ".join(files_of(patch)), "commit": commit}


def code_of(text):
    """Rust with spaces in place of what is not code: comments, and the content of texts and characters."""
    token = r"//[^\n]*|/\*.*?\*/|\bb?r(#*)\".*?\"\1|\"(?:\\.|[^\"\\])*\"|'(?:\\[^\n]*?|[^\\\n'])'"
    return re.sub(token, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)


def body_around(text, line):
    """First and last line of the body of the innermost function around a line, both counted from 0; `None` when it cannot stand
    twice: a constant function, or one that returns what only the compiler can name."""
    code, found = code_of(text), None
    line_at = lambda at: code.count("\n", 0, at)
    for start in re.finditer(r"\bfn\s+\w+", code):
        open_at = re.compile(r"[{;]").search(code, start.end()).start()
        depth, close_at = 0, open_at
        while code[open_at] == "{":
            depth += {"{": 1, "}": -1}.get(code[close_at], 0)
            if depth == 0:
                break
            close_at += 1
        if line_at(open_at) < line < line_at(close_at):
            found = (code[code.rindex("\n", 0, start.start()) : open_at], line_at(open_at) + 1, line_at(close_at) - 1)
    if found is None or re.search(r"\bconst\s+(unsafe\s+)?fn\b|->.*\bimpl\b", found[0], re.S):
        return None
    return found[1:]


def mutated(patch):
    """File, its lines, and its lines with the mutation; `None` when the patch does not fit any more."""
    (file,) = files_of(patch)
    applied = subprocess.run(["patch", "-p1", "--silent", "--forward", "-r", "-", "-o", "-"], cwd=ROOT, input=patch, capture_output=True, text=True)
    return (file, (ROOT / file).read_text().splitlines(), applied.stdout.splitlines()) if applied.returncode == 0 else None


def join(patches):
    """Files with many mutations, each behind a switch: the body of a mutated function stands there once for each, and as it is.
    Also per file what lines are whose, and the names of those that must be built alone."""
    alone, bodies, changed = [], {}, {}
    for name, patch in patches.items():
        file, before, after = mutated(patch)
        line = next(i for i, (a, b) in enumerate(zip(before, after + [None])) if a != b)
        body = body_around("\n".join(before), line) if file.endswith(".rs") else None
        if body is None:
            alone.append(name)
        else:
            bodies.setdefault(file, {}).setdefault(body, []).append((name, after[body[0] : body[1] + 1 + len(after) - len(before)]))
    owners = {}
    for file, found in bodies.items():
        lines, owned = [], owners.setdefault(file, [])
        source, at = (ROOT / file).read_text().splitlines(), 0
        for (first, last), variants in sorted(found.items()):
            if first < at:
                # It lies within another one.
                alone += [name for name, _ in variants]
                continue
            lines += source[at:first]
            begins = len(lines)
            for name, body in variants:
                on = f'std::sync::LazyLock::new(|| std::env::var("{SWITCH}").is_ok_and(|on| on == "{name}"))'
                own = len(lines)
                lines += [f"if {{ static ON: std::sync::LazyLock<bool> = {on}; *ON }} {{", *body, "} else"]
                owned.append((own, len(lines), [name]))
            lines += ["{", *source[first : last + 1], "}"]
            owned.append((begins, len(lines), [name for name, _ in variants]))
            at = last + 1
        changed[file] = ("\n".join(lines + source[at:]) + "\n").encode()
    return changed, owners, alone


def build_jointly(bench, patches):
    """Builds one program with every mutation that can be switched on; says which must be built alone. What the compiler refuses
    is taken out, since alone it may have another reason to be refused."""
    noted = bench.tree.parent / "refused.json"
    known = json.loads(noted.read_text()) if noted.exists() else {}
    refused = [n for n, p in patches.items() if known.get(n) == digest(p)]
    joint = {n: p for n, p in patches.items() if n not in refused}
    while True:
        changed, owners, alone = join(joint)
        copy_tree(bench.tree, changed)
        said = bench.build()
        if said is None:
            return [n for n in joint if n not in alone], alone + refused
        errors = [(m[1], int(m[2]) - 1) for m in re.finditer(r"^(\S+?):(\d+):\d+: error", said, re.M)]
        # The narrowest span comes first for each line.
        spans = lambda file, line: sorted((end - begin, names) for begin, end, names in owners.get(file, []) if begin <= line < end)
        culprits = {name for file, line in errors for _, names in spans(file, line)[:1] for name in names} & joint.keys()
        if not culprits:
            sys.exit(f"error: the tree with its mutations does not build:\n{said}")
        say(f"not together with the others: {', '.join(sorted(culprits))}")
        refused += culprits
        known.update((n, digest(joint[n])) for n in culprits)
        noted.write_text(json.dumps(known, indent=1, sort_keys=True))
        joint = {n: p for n, p in joint.items() if n not in culprits}


def build_alone(bench, name, patch):
    """The result as far as building tells it, and the program to be judged."""
    began = time.time()
    result = result_of(name, patch)
    # Each begins from the tree as it is.
    copy_tree(bench.tree)
    subprocess.run(["patch", "-p1", "--forward", "--no-backup-if-mismatch", "-r", "-"], cwd=bench.tree, input=patch, capture_output=True, text=True, check=True)
    said = bench.build()
    result["built_s"] = round(time.time() - began)
    if said is not None:
        result.update(outcome="unbuildable", says=next((l for l in said.splitlines() if "error" in l), "no word"))
        return result, None
    return result, bench.program("alone")


def try_all(bench, todo, patches, results, max_wall):
    """One after the other: first those in one program, then those that are built alone."""
    began, done = time.time(), 0
    def note(result):
        nonlocal done
        done += 1
        results[result["name"]] = result
        keep(result)
        told = f"by {result['killer']}: {result['says']}" if result["outcome"] == "killed" else result.get("says", "")
        say(f"{done}/{len(todo)} {result['name']}: {result['outcome']} in {result['seconds']} s {told}"[:240])
    def judge(sim, result, on, part=slice(None)):
        """Whether it could be told by this part of the suite."""
        judging = time.time()
        suite = bench.suite(patches[result["name"]], results)
        # What was asked already is not asked again, wherever it stands by now.
        asked = result.setdefault("asked", [])
        suite = [item for item in suite if item[0] not in asked][part]
        broken = bench.judge(sim, suite, on)
        asked += [item[0] for item in suite]
        result["seconds"] = round(result.get("seconds", result.get("built_s", 0)) + time.time() - judging)
        if broken is None and part != slice(None):
            return False
        del result["asked"]
        result.update({"outcome": "killed", "killer": broken[0], "says": broken[1]} if broken else {"outcome": "survived"})
        note(result)
        return True
    def is_over():
        if time.time() - began > max_wall:
            say(f"{len(todo) - done} mutations were not begun within {max_wall:.0f} s")
            return True
        return False
    seed_target(bench.target)
    # All of them, tried or not, so that the program stays the same.
    fitting = [n for n in patches if mutated(patches[n]) is not None]
    for name in [n for n in todo if n not in fitting]:
        note({**result_of(name, patches[name]), "outcome": "stale", "says": "the patch does not fit", "seconds": 0})
    joint, alone = build_jointly(bench, {n: patches[n] for n in fitting})
    say(f"{len(joint)} mutations built in one program, {time.time() - began:.0f} s; {len(alone)} are built alone")
    # What is said to survive takes longest, so it comes last.
    ordered = sorted(todo, key=lambda n: not {"equivalent", "survives"}.isdisjoint(header(patches[n])))
    joint, alone = [n for n in ordered if n in joint], [n for n in ordered if n in alone]
    sim = bench.plain = bench.program("joint")
    # The likely ones for each, then the rest for those that are left: what is quick to tell is told first.
    begun = [result_of(name, patches[name]) for name in joint]
    left = [result for result in begun if not is_over() and not judge(sim, result, result["name"], slice(LIKELY))]
    for result in left:
        if is_over():
            return
        judge(sim, result, result["name"])
    for name in alone:
        if is_over():
            return
        result, sim = build_alone(bench, name, patches[name])
        if sim is None:
            note({**result, "seconds": result["built_s"]})
        else:
            judge(sim, result, name)


def defences_ablated():
    """The stories with one defence switched off: what it buys is what breaks without it."""
    rows = []
    for path in sorted((ROOT / "scenarios/negative").glob("*.toml")):
        story = tomllib.loads(path.read_text())
        off = [story["sabotage"]] if story.get("sabotage") else story.get("without", [])
        if off:
            rows.append((", ".join(f"`{o}`" for o in off), ", ".join(story["expect"].get("broken", [])), story["summary"]))
    return rows


def page(patches, results):
    def row(*cells):
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
    heads = {name: header(text) for name, text in patches.items()}
    known = {n: r for n, r in results.items() if n in patches and r["patch"] == digest(patches[n])}
    of = lambda outcome: [n for n in sorted(known) if known[n]["outcome"] == outcome]
    killed, survived = of("killed"), of("survived")
    equal = [n for n in survived if "equivalent" in heads[n]]
    real = [n for n in survived if "equivalent" not in heads[n]]
    judged = len(killed) + len(real)
    by = lambda names, hand: len([n for n in names if heads[n]["drawn"].startswith("by hand") == hand])
    share = f"{100 * len(killed) / judged:.1f} %" if judged else "none yet"
    out = ["# Mutations of the runtime", "",
           "Written by `ci/mutants`; do not edit. Each mutation changes one line of the runtime, never of the simulated services,",
           "and the scenarios of tier `pr` in whose world the line runs, with a small sweep, must notice. Nothing else is asked: no unit test is run.",
           "One mutation is on at a time; most are in one program, behind a switch, so that not each has to be built.", "",
           f"**Score{' so far' if len(known) < len(patches) else ''}: {len(killed)} of {judged} killed, {share}.** Of {len(patches)} mutations {by(patches, True)} were made by hand and",
           f"{by(patches, False)} drawn by cargo-mutants; {len(equal)} survivors are equivalent to the original, {len(of('unbuildable'))} do not build,",
           f"{len(of('stale'))} no longer fit the source and {len(patches) - len(known)} were not tried yet.",
           *(["Those that the likely scenarios did not notice are tried last, so this is too good until all are."] if len(known) < len(patches) else []), "",
           row("", "killed", "survived", "equivalent"), row("---", "---:", "---:", "---:"),
           row("by hand", by(killed, True), by(real, True), by(equal, True)),
           row("drawn", by(killed, False), by(real, False), by(equal, False)), ""]
    out += ["## Survivors", ""]
    if real:
        out += [row("mutation", "defence", "why no scenario noticed"), row("---", "---", "---")]
        out += [row(f"`{n}`", heads[n]["defence"], heads[n].get("survives", "not explained yet")) for n in real]
    else:
        out += ["None."]
    out += ["", "## Equivalent mutations", ""]
    if equal:
        out += [row("mutation", "change", "why no run can tell"), row("---", "---", "---")]
        change = lambda n: "`" + next((l[1:].strip() for l in patches[n].splitlines() if l.startswith("+") and not l.startswith("+++")), "") + "`"
        out += [row(f"`{n}`", change(n), heads[n]["equivalent"]) for n in equal]
    else:
        out += ["None."]
    out += ["", "## Killed", "", row("mutation", "defence", "killed by", "what it saw"), row("---", "---", "---", "---")]
    out += [row(f"`{n}`", heads[n]["defence"], f"`{known[n]['killer']}`", known[n]["says"][:160]) for n in killed]
    kills = {}
    for n in killed:
        kills[known[n]["killer"]] = kills.get(known[n]["killer"], 0) + 1
    out += ["", "## Which scenarios killed", "", "The first one that breaks counts, so this says which are asked first, not which could have seen it.", "",
            row("scenario", "kills"), row("---", "---:")]
    out += [row(f"`{k}`", n) for k, n in sorted(kills.items(), key=lambda kv: (-kv[1], kv[0]))]
    out += ["", "## What each defence buys", "",
            "The stories of `scenarios/negative` switch a defence off. These invariants break without it, and are whole in the same",
            "story with it, which every run of such a story checks.", "", row("defence off", "breaks", "story"), row("---", "---", "---")]
    out += [row(*r) for r in defences_ablated()]
    for outcome, title in [("unbuildable", "Not buildable"), ("stale", "No longer fitting")]:
        if of(outcome):
            out += ["", f"## {title}", ""] + [f"- `{n}`: {known[n]['says']}" for n in of(outcome)]
    missing = [n for n in patches if n not in known]
    if missing:
        out += ["", "## Not tried yet", "", ", ".join(f"`{n}`" for n in missing) + "."]
    PAGE.write_text("\n".join(out) + "\n")
    say(f"{len(killed)} of {judged} killed, {share}; {len(missing)} not tried yet: {PAGE.relative_to(ROOT)}")


def draw(count, seed):
    """Draws from all mutations of the defences that change one line into one other."""
    version = subprocess.run(["cargo", "mutants", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    files = []
    for pattern in DEFENCES:
        inside = re.search(r"\{(.*)\}", pattern)
        files += [pattern.replace(inside[0], one) for one in inside[1].split(",")] if inside else [pattern]
    command = ["cargo", "mutants", "--list", "--json", "--diff", "--no-config", "--workspace", "--exclude-re", "impl fmt::|impl Debug|fmt::Result"]
    command += [part for file in files for part in ("-f", file)]
    listed = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    changed = lambda m, sign: [l for l in m["diff"].splitlines() if l.startswith(sign) and not l.startswith(sign * 3)]
    one_line = [m for m in listed if len(changed(m, "-")) == 1 and len(changed(m, "+")) == 1]
    one_line.sort(key=lambda m: (m["file"], m["span"]["start"]["line"], m["span"]["start"]["column"], m["name"]))
    drawn = random.Random(seed).sample(one_line, count)
    for mutant in drawn:
        line = mutant["span"]["start"]["line"]
        what = re.sub(r"^\S+?: ", "", mutant["name"])
        stem = mutant["file"].replace("runtime/", "").replace("/src", "").removesuffix(".rs")
        name = "drawn_" + re.sub(r"\W+", "_", f"{stem}_{line}_{mutant['span']['start']['column']}").strip("_")
        diff = re.sub(r"^--- .*\n\+\+\+ .*\n", f"--- a/{mutant['file']}\n+++ b/{mutant['file']}\n", mutant["diff"])
        head = f"# defence: {mutant['function']['function_name'] if mutant.get('function') else stem}: {what}\n"
        head += f"# drawn: cargo-mutants {version}, one of {len(one_line)} that change one line, by random.Random({seed}).sample\n"
        (PATCHES / f"{name}.patch").write_text(head + diff)
    say(f"drew {len(drawn)} of {len(one_line)} one-line mutations, {len(listed)} in all")


def main():
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    parser = argparse.ArgumentParser(description="Applies mutations of the runtime one at a time; the scenarios must notice.")
    parser.add_argument("names", nargs="*", help="names or patterns of mutations; all of them without any")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--jobs", type=int, default=2, help="scenarios at a time")
    parser.add_argument("--max-wall", type=float, default=float("inf"), help="seconds after which no further mutation is begun")
    parser.add_argument("--page", action="store_true", help="write the page and try nothing")
    parser.add_argument("--draw", type=int, metavar="N", help="draw N mutations by cargo-mutants and try nothing")
    parser.add_argument("--seed", type=int, default=6, help="of --draw")
    parser.add_argument("--work", type=pathlib.Path, default=TARGET.parent / "mutants", help="scratch copy and its target directory")
    options = parser.parse_args()
    if options.draw:
        draw(options.draw, options.seed)
        return
    patches, results = load_patches(), load_results()
    wanted = [n for n in patches if not options.names or any(fnmatch.fnmatch(n, pattern) for pattern in options.names)]
    if not wanted:
        sys.exit(f"error: found no mutation like {options.names}, expected one of {', '.join(patches)}")
    tried = lambda n: n in results and results[n]["patch"] == digest(patches[n])
    todo = [n for n in wanted if options.again or not tried(n)]
    if not options.page and todo:
        try_all(Bench(options.work, options.jobs), todo, patches, results, options.max_wall)
    page(patches, results)


main()
