#!/usr/bin/env python3
"""Write deploy/grafana/dashboards/*.json: `python deploy/grafana/dashboards.py`. Change the panels here, not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from panels import Dashboard, Panel  # noqa: E402

RATE = "[$__rate_interval]"
SERVICES = '{job=~"coordinator|discovery|gateway|aggregator|worker"}'


def stat(title: str, description: str, query: str, unit: str = "short", **more: object) -> Panel:
    """The newest value of one query."""
    return Panel("stat", title, description, {"": query}, unit, **{"width": 4, **more})  # type: ignore[arg-type]


def series(title: str, description: str, queries: dict[str, str], unit: str = "short", **more: object) -> Panel:
    """Curves over time."""
    return Panel("timeseries", title, description, queries, unit, **more)  # type: ignore[arg-type]


def quantile(share: float, metric: str, by: str = "") -> str:
    """Of a histogram, over the panel's interval."""
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{RATE})))"


JOB = Dashboard(
    "cortex-job",
    "Cortex / Jobs",
    "Loss, accuracy, rounds and what they cost.",
    (
        stat(
            "Training",
            "Jobs that are neither paused nor wait for workers.",
            'sum(cortex_coordinator_jobs{status!~"paused|submitted"})',
        ),
        stat("Rounds", "In the chosen time.", "sum(increase(cortex_coordinator_rounds_total[$__range]))"),
        stat(
            "Retried",
            "Attempts at a round that were given up.",
            "sum(increase(cortex_coordinator_rounds_retried_total[$__range]))",
            limits=(1, 10),
        ),
        stat(
            "Failed jobs",
            "In the chosen time.",
            'sum(increase(cortex_coordinator_jobs_ended_total{status="failed"}[$__range]))',
            limits=(1, 3),
        ),
        stat(
            "Goodput",
            "Examples trained on, a second, whole network.",
            f"sum(rate(cortex_worker_training_examples_total{RATE}))",
        ),
        stat("Progress", "Of the job that is furthest.", "max(cortex_coordinator_job_progress_ratio)", "percentunit"),
        series(
            "Loss",
            "Of each job's newest round; jobs of one name share a curve.",
            {"{{name}} {{part}}": 'cortex_coordinator_job_loss{name=~"$job_name"}'},
            "none",
            width=12,
        ),
        series(
            "Accuracy",
            "Of each job's newest round.",
            {"{{name}} {{part}}": 'cortex_coordinator_job_accuracy_ratio{name=~"$job_name"}'},
            "percentunit",
            width=12,
        ),
        series(
            "Round",
            "Newest finished round of each job.",
            {"{{name}}": 'cortex_coordinator_job_round{name=~"$job_name"}'},
            "none",
        ),
        series(
            "Time that counted",
            "Goodput of each job: the share of its time that went into rounds that counted.",
            {"{{name}}": 'cortex_coordinator_job_goodput_ratio{name=~"$job_name"}'},
            "percentunit",
        ),
        series(
            "Seconds of a round",
            "Median by phase; train and exchange are the slowest worker's.",
            {"{{phase}}": quantile(0.5, "cortex_coordinator_round_seconds", "phase")},
            "s",
        ),
        series(
            "Updates",
            "Accepted, and left out when their round closed.",
            {"{{result}}": f"sum by (result) (rate(cortex_coordinator_updates_total{RATE}))"},
            "cps",
            stacked=True,
        ),
        series(
            "Bytes of finished rounds",
            "Payload as sent.",
            {"{{direction}}": f"sum by (direction) (rate(cortex_coordinator_bytes_total{RATE}))"},
            "Bps",
        ),
        series(
            "Phases of workers",
            "Median time of a piece of work in each phase.",
            {"{{phase}}": quantile(0.5, "cortex_worker_phase_seconds", "phase")},
            "s",
        ),
        series(
            "Examples",
            "Trained on, by worker.",
            {"{{instance}}": f"rate(cortex_worker_training_examples_total{RATE})"},
            "cps",
            stacked=True,
        ),
    ),
    {"job_name": "label_values(cortex_coordinator_job_round, name)"},
)

NETWORK = Dashboard(
    "cortex-network",
    "Cortex / Network",
    "Who is there, where, how healthy, with what left.",
    (
        stat("Live nodes", "With a lease that holds.", 'sum(cortex_discovery_nodes{health="live"})'),
        stat(
            "Silent nodes",
            "Suspect or expired.",
            'sum(cortex_discovery_nodes{health!="live"}) or vector(0)',
            limits=(1, 3),
        ),
        stat("Workers", "Live ones.", 'sum(cortex_discovery_nodes{role="worker", health="live"})', limits=(2, 1)),
        stat("Free places", "Jobs that could be taken.", "sum(cortex_worker_slots) - sum(cortex_worker_jobs)"),
        stat("Services up", "That Prometheus reaches.", f"sum(up{SERVICES})"),
        stat(
            "Services down",
            "That it does not reach.",
            f"count(up{SERVICES} == 0) or vector(0)",
            limits=(1, 2),
        ),
        series(
            "Nodes by region",
            "Live ones, by role.",
            {"{{region}} {{role}}": 'sum by (region, role) (cortex_discovery_nodes{health="live"})'},
            stacked=True,
        ),
        series(
            "Nodes by health",
            "As discovery sees them.",
            {"{{health}}": "sum by (health) (cortex_discovery_nodes)"},
            stacked=True,
        ),
        series(
            "Heartbeats",
            "Taken by discovery.",
            {"{{role}}": f"sum by (role) (rate(cortex_discovery_heartbeats_total{RATE}))"},
            "cps",
        ),
        series(
            "Changes",
            "Of membership or health.",
            {"{{event}}": f"sum by (event) (rate(cortex_discovery_changes_total{RATE}))"},
            "cps",
        ),
        series(
            "Processor",
            "Share of the machine's cores in use.",
            {"{{job}} {{instance}}": "cortex_node_cpu_utilisation_ratio"},
            "percentunit",
        ),
        series(
            "Memory left",
            "Share of the machine's, or of the container's limit.",
            {"{{job}} {{instance}}": "cortex_node_memory_available_bytes / cortex_node_memory_bytes"},
            "percentunit",
        ),
        series(
            "Disk left",
            "Where the state is kept.",
            {"{{job}} {{instance}}": "cortex_node_disk_free_bytes"},
            "bytes",
        ),
        series(
            "Memory of the processes",
            "Resident.",
            {"{{job}} {{instance}}": f"process_resident_memory_bytes{SERVICES}"},
            "bytes",
        ),
        series(
            "Traffic of the machines",
            "Sent.",
            {"{{job}} {{instance}}": f"rate(cortex_node_network_sent_bytes_total{RATE})"},
            "Bps",
        ),
    ),
)

DATA = Dashboard(
    "cortex-data-plane",
    "Cortex / Data plane",
    "Updates and model versions between workers and aggregators.",
    (
        stat("Open rounds", "That take updates.", "sum(cortex_aggregator_open_rounds)"),
        stat("Spool", "Updates on the aggregators' disks.", "sum(cortex_aggregator_spool_bytes)", "bytes"),
        stat("Versions", "Held by aggregators.", "sum(cortex_aggregator_versions)"),
        stat("Lines", "Workers with an open line to the coordinator.", "sum(cortex_worker_attended)"),
        stat("Taken", "Sealed bytes of updates.", f"sum(rate(cortex_aggregator_received_bytes_total{RATE}))", "Bps"),
        stat("Given", "Sealed bytes of versions.", f"sum(rate(cortex_aggregator_sent_bytes_total{RATE}))", "Bps"),
        series(
            "Updates taken",
            "By aggregator.",
            {"{{instance}}": f"rate(cortex_aggregator_received_bytes_total{RATE})"},
            "Bps",
        ),
        series(
            "Versions given",
            "By aggregator; relayed ones are fetched from one tier up.",
            {
                "{{instance}}": f"rate(cortex_aggregator_sent_bytes_total{RATE})",
                "{{instance}} relayed": f"rate(cortex_aggregator_relayed_bytes_total{RATE})",
            },
            "Bps",
        ),
        series(
            "Bytes a parameter",
            "What a codec really costs: 4 is float32, 1 is int8.",
            {
                "{{codec}}": f"sum by (codec) (rate(cortex_aggregator_accepted_bytes_total{RATE}))"
                f" / sum by (codec) (rate(cortex_aggregator_accepted_parameters_total{RATE}))"
            },
            "none",
        ),
        series(
            "Uploads",
            "By how they ended.",
            {"{{outcome}}": f"sum by (outcome) (rate(cortex_aggregator_updates_total{RATE}))"},
            "cps",
            stacked=True,
        ),
        series(
            "Spool",
            "Bytes waiting for their round to be folded.",
            {"{{instance}}": "cortex_aggregator_spool_bytes"},
            "bytes",
        ),
        series(
            "Fold",
            "Time to fold a round into the next version.",
            {
                "median": quantile(0.5, "cortex_aggregator_fold_seconds"),
                "95 %": quantile(0.95, "cortex_aggregator_fold_seconds"),
            },
            "s",
        ),
        series(
            "Workers' uploads",
            "Sealed bytes of updates sent.",
            {"{{instance}}": f"rate(cortex_worker_sent_bytes_total{RATE})"},
            "Bps",
        ),
        series(
            "Workers' downloads",
            "Sealed bytes of models received.",
            {"{{instance}}": f"rate(cortex_worker_received_bytes_total{RATE})"},
            "Bps",
        ),
        series(
            "Open streams",
            "RPCs being answered now.",
            {"{{method}}": 'sum by (method) (cortex_rpc_open_requests{job="aggregator"})'},
        ),
    ),
)

SECURITY = Dashboard(
    "cortex-security",
    "Cortex / Security",
    "Certificates, who was refused, what was rotated.",
    (
        stat(
            "Shortest certificate",
            "Time until the first one ends.",
            "min(cortex_certificate_expires_seconds)",
            "s",
            limits=(43_200, 21_600),
        ),
        stat(
            "Renewed",
            "Certificates, in the chosen time.",
            'sum(increase(cortex_certificate_renewals_total{result="renewed"}[$__range]))',
        ),
        stat(
            "Renewals failed",
            "In the chosen time.",
            'sum(increase(cortex_certificate_renewals_total{result="failed"}[$__range]))',
            limits=(1, 3),
        ),
        stat(
            "Refusals",
            "RPCs, in the chosen time.",
            "sum(increase(cortex_rpc_refusals_total[$__range]))",
            limits=(10, 100),
        ),
        stat("Shut out", "Identities, entirely or in part.", "sum(cortex_discovery_denials)"),
        stat(
            "Audit failures",
            "Records that could not be written.",
            "sum(increase(cortex_rpc_audit_failures_total[$__range]))",
            limits=(1, 2),
        ),
        series(
            "Life of certificates",
            "Time left; a renewed one jumps up again.",
            {"{{job}} {{instance}}": "cortex_certificate_expires_seconds"},
            "s",
            width=12,
        ),
        series(
            "RPCs refused",
            "By what was wrong with the caller.",
            {"{{job}} {{kind}}": f"sum by (job, kind) (rate(cortex_rpc_refusals_total{RATE}))"},
            "cps",
            width=12,
        ),
        series(
            "HTTP refused",
            "401: who is it; 403: may not; 429: too often.",
            {"{{status}}": f'sum by (status) (rate(cortex_gateway_requests_total{{status=~"401|403|429"}}{RATE}))'},
            "cps",
        ),
        series(
            "Certificates made",
            "By discovery.",
            {"{{role}} {{why}}": f"sum by (role, why) (rate(cortex_discovery_certificates_total{RATE}))"},
            "cps",
        ),
        series(
            "Authorities made",
            "New roots and issuing authorities, in all.",
            {"{{kind}}": "sum by (kind) (cortex_discovery_authority_rotations_total)"},
        ),
    ),
)

OBJECTIVES = Dashboard(
    "cortex-objectives",
    "Cortex / Objectives",
    "Service levels: 99.5 % of HTTP requests a month answered, 99 % of rounds done at the first attempt.",
    (
        stat(
            "API",
            "HTTP requests answered without an error of ours, over an hour.",
            "1 - cortex:api_requests:error_ratio_rate1h",
            "percentunit",
            limits=(0.999, 0.995),
        ),
        stat(
            "Budget burnt",
            "How many times as fast as the month allows, over an hour.",
            "cortex:api_requests:error_ratio_rate1h / 0.005",
            "none",
            limits=(1, 6),
        ),
        stat(
            "Rounds",
            "Done at the first attempt, over an hour.",
            "cortex:rounds:success_ratio_rate1h",
            "percentunit",
            limits=(0.99, 0.95),
        ),
        stat("Alerts", "Firing now.", 'count(ALERTS{alertstate="firing"}) or vector(0)', limits=(1, 3)),
        stat("Goodput", "Examples a second, over five minutes.", "cortex:training_examples:rate5m"),
        stat(
            "Peers",
            "Of the gateway, that answer.",
            "min(cortex_gateway_peer_up)",
            "none",
            limits=(1, 0.5),
        ),
        series(
            "Errors of the API",
            "Share of HTTP requests; the objective is 0.5 %.",
            {
                "5 min": "cortex:api_requests:error_ratio_rate5m",
                "1 h": "cortex:api_requests:error_ratio_rate1h",
                "6 h": "cortex:api_requests:error_ratio_rate6h",
            },
            "percentunit",
            width=12,
        ),
        series(
            "Time of the API",
            "95 % of answers begin sooner.",
            {"{{route}}": quantile(0.95, "cortex_gateway_request_seconds", "route")},
            "s",
            width=12,
        ),
        series(
            "Errors of RPCs",
            "Share answered with an error of the service's own.",
            {"{{job}}": "cortex:rpc_requests:error_ratio_rate5m"},
            "percentunit",
        ),
        series(
            "Time of a round",
            "95 % are done sooner, by phase.",
            {"{{phase}}": "cortex:round_seconds:p95_rate1h"},
            "s",
        ),
        series(
            "Requests",
            "HTTP, by status.",
            {"{{status}}": f"sum by (status) (rate(cortex_gateway_requests_total{RATE}))"},
            "cps",
            stacked=True,
        ),
    ),
)

ALL = {"job": JOB, "network": NETWORK, "data-plane": DATA, "security": SECURITY, "objectives": OBJECTIVES}


def text_of(dashboard: Dashboard) -> str:
    """The dashboard's file."""
    return json.dumps(dashboard.json(), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write them all."""
    for name, dashboard in ALL.items():
        (HERE / "dashboards" / f"{name}.json").write_text(text_of(dashboard), encoding="utf-8")


if __name__ == "__main__":
    main()
