"""The page of results against the JSON files that it is written from."""

import json
import shutil
from dataclasses import replace
from statistics import mean

import pytest

from tests.conftest import ROOT
from vae_ood.reproduce import claims, latents, pages, runs
from vae_ood.reproduce.__main__ import main
from vae_ood.reproduce.compute import QUANTITIES, gap_of
from vae_ood.reproduce.paper import ABOVE, BELOW, OFFSET, PAPER
from vae_ood.reproduce.tables import gap

RESULTS = ROOT / "results"


def of(target):
    """The JSON file of a target."""
    return json.loads((RESULTS / f"reproduce/{target}.json").read_text())


def test_the_page_says_what_the_json_files_say():
    assert (RESULTS / "README.md").read_text() == claims.page(RESULTS), "run python -m vae_ood.reproduce claims"


def test_every_claim_of_the_design_is_on_the_page():
    assert list(dict.fromkeys(claim[:2] for claim, *_ in claims.CLAIMS)) == [f"P{n}" for n in range(1, 9)]
    for claim, name, word, _ in claims.CLAIMS:
        if word:  # it is a check's
            checks = json.loads((RESULTS / f"{name}.json").read_text())["claims"]
            assert any(check["claim"].startswith(word) for check in checks), claim


def test_every_check_of_p2_is_in_one_verdict():
    words = [word for _, name, word, _ in claims.CLAIMS if name == "reproduce/compute"]
    for check in of("compute")["claims"]:
        assert sum(check["claim"].startswith(word) for word in words) == 1, check["claim"]


def test_a_changed_number_changes_the_page_and_its_verdict(tmp_path):
    shutil.copytree(RESULTS, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.png", "*.pt"))
    path = tmp_path / "reproduce/table1.json"
    numbers = json.loads(path.read_text())
    run = numbers["columns"][0]["runs"][0]
    run["sets"]["mnist"]["bpd"] = run["sets"]["test"]["bpd"] + 7.0123
    numbers["claims"][0]["held"] = False
    path.write_text(json.dumps(numbers))
    row = next(line for line in claims.page(tmp_path).splitlines() if line.startswith("| P1"))
    assert "+7.012 bpd" in row and "| not reproduced |" in row
    path.unlink()
    assert "| P1: outliers have the higher NLL: MNIST minus test (bpd) | not reached |" in claims.page(tmp_path)


@pytest.mark.parametrize(("held", "expected"), [
    ([True, True], "reproduced"), ([True, False, None], "in part: 1 held, 1 NOT held, 1 not reached of its checks"),
    ([True, None], "in part: 1 held, 1 not reached of its checks"), ([False], "not reproduced"), ([], "not reached"),
    ([False, None], "not reproduced: 1 NOT held, 1 not reached of its checks"),
    ([None, None], "not reached")])
def test_verdicts(held, expected):
    assert claims.verdict(held) == expected


def test_gaps_that_were_not_judged_are_no_choice_of_alpha():
    row = {"alpha": 0.5, "gap_bpd": 0.01, "z": 2.0}
    ours, *_ = claims.p8({"rows": {"10": [row], "20": [row]}, "chosen_alpha": {"20": None}})
    assert ours == "alpha chosen: none at 20 steps"


@pytest.mark.parametrize("name", [
    "table1", "compute", "fig4", "homotopy", "select", "path", "early", "seen", "unknowns"])
def test_an_experiment_without_runs_is_not_reached(tmp_path, monkeypatch, name):
    monkeypatch.setattr("sys.argv", ["reproduce", name, "--budget", "0", "--runs", str(tmp_path / "none"), "--out",
                                     str(tmp_path / "reproduce")])
    main()
    assert (tmp_path / "reproduce" / f"{name}.json").exists()
    assert claims.page(tmp_path).count("| not reached |") == len(claims.CLAIMS)


def test_alphas_that_were_not_run_are_not_reached(tmp_path):
    shutil.copytree(RESULTS / "reproduce", tmp_path / "reproduce")
    path = tmp_path / "reproduce/compute.json"
    numbers = json.loads(path.read_text())
    numbers["runs"] = [run for run in numbers["runs"] if run["alpha"] <= 1]
    path.write_text(json.dumps(numbers))
    assert "SVHN minus test (bpd) is above 0 | not reached | not run |" in claims.page(tmp_path)


@pytest.mark.parametrize(("target", "kept_in", "arguments"), [
    ("compute", "fast", ["--seeds", "3"]), ("select", "fast", []), ("table2", "fast", ["--seeds", "3"]),
    ("table1", "fast", ["--iters", "2800", "--seeds", "3"]),
    ("fig4", "paper", ["--recipe", "paper"]),
    *((target, "paper", []) for target in ("path", "early", "seen", "unknowns"))])
def test_the_pages_follow_from_the_kept_runs(tmp_path, monkeypatch, target, kept_in, arguments):
    for file in (RESULTS / "reproduce").glob("*.json"):  # of which `seen` reads some
        shutil.copy(file, tmp_path)
    (tmp_path / f"{target}.json").unlink()
    monkeypatch.setattr("sys.argv", ["reproduce", target, "--budget", "0", *arguments, "--runs",
                                     str(RESULTS / kept_in), "--out", str(tmp_path)])
    monkeypatch.setattr(pages, "figure", lambda *arguments: None)
    main()
    ours, kept = (json.loads((folder / f"{target}.json").read_text()) for folder in (tmp_path, RESULTS / "reproduce"))
    assert set(ours) == set(kept)
    for key in set(kept) - {"command"}:
        assert without_commands(ours[key]) == without_commands(kept[key])
    ours, kept = ((folder / f"{target}.md").read_text().splitlines() for folder in (tmp_path, RESULTS / "reproduce"))
    assert ours[:-1] == kept[:-1]  # the last line is the command's


def without_commands(value):
    """A value of a JSON file without the commands in it, which name the folder of the runs."""
    if isinstance(value, dict):
        return {name: without_commands(one) for name, one in value.items() if name != "command"}
    return [without_commands(one) for one in value] if isinstance(value, list) else value


def test_homotopy_s_verdicts_follow_from_the_kept_figures(tmp_path, monkeypatch):
    kept = of("homotopy")

    def one(run, args):
        return next(m for m in kept["arms"][run.gamma] if m["seed"] == run.seed)

    def read_log(run, args):
        log = one(run, args)["log"]
        return [dict(zip(log, line, strict=True)) for line in zip(*log.values(), strict=True)]

    alpha = kept["arms"][kept["learned"]][0]["alpha"]
    assert (alpha, tuple(kept["arms"])) == latents.ARMS["fast"]  # the kept command makes it again
    (tmp_path / f"{kept['data']}_a{alpha:g}_k64_fast_{kept['learned']}_").mkdir()
    monkeypatch.setattr(runs, "plan", lambda columns, args: [
        [replace(run, seed=m["seed"]) for m in kept["arms"][run.gamma]] for run in columns])
    monkeypatch.setattr(runs, "attempt", one)
    monkeypatch.setattr(runs, "read_log", read_log)
    monkeypatch.setattr("sys.argv", ["reproduce", "homotopy", "--runs", str(tmp_path), "--out", str(tmp_path)])
    monkeypatch.setattr(pages, "figure", lambda *arguments: None)
    main()
    ours = json.loads((tmp_path / "homotopy.json").read_text())
    assert {key: ours[key] for key in ours if key != "command"} == {key: kept[key] for key in kept if key != "command"}


def over(values, form):
    """The range of values, as the pages write it."""
    return f"{min(values):{form}} to {max(values):{form}}"


def ends():
    """{alpha: what `path` measured at the last step}."""
    return {m["alpha"]: m for m in sorted(of("path")["runs"], key=lambda m: m["step"])}


def chosen():
    """What `early` measured at each alpha's chosen step."""
    early = of("early")
    return [m for alpha, step in early["chosen"].items() for m in early["runs"]
            if m["alpha"] == float(alpha) and m["step"] == step]


def by_kappa():
    """{kappa: what `fig4` measured}, the largest last."""
    return {m["kappa"]: m for column in of("fig4")["columns"] for m in column["runs"]}


def test_the_texts_quote_the_figures():
    path, early, seen, fig4 = ends(), of("early"), of("seen"), by_kappa()
    kl = sorted(fig4[512]["kl_per_dim"], reverse=True)
    active = [m["active_dims"] for column in of("table1")["columns"] for m in column["runs"] if m["kappa"] == 512]
    stopped = [gap(m, "svhn") for m in chosen()]
    fast = next(column["runs"] for column in of("table2")["columns"] if column["label"] == 0.25)
    tests = mean(m["sets"]["test"]["bpd"] for m in fast), path[0.25]["sets"]["test"]["bpd"]
    peaks = [m["gradient"]["largest"] for m in of("homotopy")["arms"]["fixed"]]
    varied = [-gap(m, "svhn") for m in of("unknowns")["runs"].values()]
    gaps = {alpha: f"{gap(m, 'test', 'train'):.2f}" for alpha, m in path.items()}
    rule, compute = of("select")["chosen_alpha"], of("compute")["runs"]
    two, three = (next(m for m in compute if (m["alpha"], m["iters"], m["seed"]) == (alpha, 2_500, 0))
                  for alpha in (2, 3))
    seeds = [[m for m in compute if (m["alpha"], m["iters"]) == (alpha, 10_000)] for alpha in BELOW]
    gammas, bpds = ([[QUANTITIES[name](m) for m in of_alpha] for of_alpha in seeds] for name in ("gamma", "test bpd"))
    assert [[gap_of(m)["significant"] for m in of_alpha] for of_alpha in seeds[:2]] == [[False] * 3, [True] * 3]
    ratios, apart = [max(g) / min(g) - 1 for g in gammas], [max(b) - min(b) for b in bpds]
    short = [path[1]["sets"][one]["bpd"] - PAPER["table2"][1][one] - OFFSET for one in ("train", "svhn")]
    marginal = [row["z"] for row in of("select")["rows"]["2500"] if row["alpha"] >= 2]
    learned = seen["at_the_papers_training_bpd"]["svhn"]["2"]["10000"] - PAPER["table2"][2]["svhn"] - OFFSET
    for target, texts in {
        "compute": [f"rise by {three['gamma'] / two['gamma'] - 1:.1%} and "
                    f"{three['sets']['test']['bpd'] - two['sets']['test']['bpd']:.3f} bpd",
                    f"differ by {100 * min(ratios):.1f} to {max(ratios):.1%} and {over(apart, '.3f')} bpd"],
        "select": [f"alpha = {rule['2500']:g} after 2,500 steps, and alpha = 1/{1 / rule['10000']:g} after 10,000",
                   f"z is {over(marginal, '.1f')} from alpha = 2 on"],
        "path": [f"ends {gaps[0.25]}, {gaps[0.5]} and {gaps[1]} above the training bpd",
                 f"test bpd {tests[0]:.3f} and {tests[1]:.3f}",
                 f"SVHN minus test {mean(gap(m, 'svhn') for m in fast):.3f} and {gap(path[0.25], 'svhn'):.3f}"],
        "early": [f"SVHN lies {', '.join(f'{-value:.2f}' for value in stopped[:-1])} and {-stopped[-1]:.2f} bpd below",
                  f"overfits from {early['chosen']['1']:,} on", f"to its last, {early['chosen']['2']:,}"],
        "seen": [f"at alpha = 1 ends {short[0]:.3f} bpd short of the paper's, SVHN {short[1]:.2f} above)",
                 f"{learned:.2f} above at the paper's alpha = 2",
                 f"rises to {max(gap(m, 'svhn', 'train') for m in seen['few']):.1f} bpd above",
                 f"falls to {-min(gap(m, 'svhn') for m in seen['few']):.1f} below"],
        "unknowns": [f"{over(varied, '.2f')} bpd below"],
        "fig4": [f"from {kl[74]:.2f} to {kl[86]:.2f} nats from the 75th to the 87th",
                 f"{latents.holding(kl)} hold 90% of it, of 128 there are {latents.holding(fig4[128]['kl_per_dim'])}.",
                 f"(`table1`, alpha = 1: {over(active, 'd')} of 512 active)",
                 f"{fig4[512]['active_dims']} stay above 0.05 nats, the others above {int(100 * kl[-1]) / 100}",
                 "MNIST takes {:.2f}, {:.2f} and {:.2f} bpd more".format(*(gap(m, "mnist") for m in fig4.values()))],
        "homotopy": [f"peaks at {round(min(peaks), -1):.0f} to {round(max(peaks), -1):.0f}"],
    }.items():
        for text in texts:
            assert text in claims.MEANING[f"reproduce/{target}"], text


def test_the_front_page_quotes_the_figures_of_the_paper_s_claims():
    readme, path, fig4, compute = (ROOT / "README.md").read_text(), ends(), by_kappa(), of("compute")["runs"]
    last = {m["alpha"]: max(one["iters"] for one in compute if one["alpha"] == m["alpha"]) for m in compute}
    auroc = {name: {alpha: mean(m["detection"][name]["auroc"] for m in compute
                                if (m["alpha"], m["iters"]) == (alpha, iters))
                    for alpha, iters in last.items()} for name in ("svhn", "celeba")}
    table1 = [m["detection"]["mnist"]["auroc"] for column in of("table1")["columns"] for m in column["runs"]]
    for text in (
            f"AUROC {over(table1, '.4f')} over six",
            "AUROC {:.4f}, {:.4f}, {:.4f} at".format(*(m["detection"]["mnist"]["auroc"] for m in fig4.values())),
            f"| AUROC {over([auroc['svhn'][alpha] for alpha in BELOW], '.3f')} for",
            ", ".join(f"{m['gamma']:.4f}" for m in chosen()) + " at",
            f"| AUROC {over(auroc['celeba'].values(), '.3f')}, each",
            f"| AUROC {over([auroc['svhn'][alpha] for alpha in ABOVE], '.3f')} after",
            f"{gap(path[0.25], 'test', 'train'):.2f}, {gap(path[0.5], 'test', 'train'):.2f} and "
            f"{gap(path[1], 'test', 'train'):.2f} bpd more",
            f"{over([m['detection']['svhn']['auroc'] for m in path.values()], '.3f')} (200,000, one)",
            f"{fig4[512]['active_dims']} of 512 stay active"):
        assert text in readme, text
