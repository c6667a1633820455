#!/usr/bin/env bash
# Written by fulltune launch
# Ctrl-C or TERM makes all machines save and end; a third signal ends them at once. The exit code is machine 0's.
# Names are quoted so that nothing in them is expanded:
# shellcheck disable=SC2016
set -u

# edit: the machines as ssh knows them: HOST, USER@HOST or ssh://USER@HOST:PORT; the first one is machine 0
targets=(
{% for rank in range(train.num_machines) %}
    EDIT-HOST-{{ rank }}
{% endfor %}
)
{% if train.num_machines > 1 %}
# edit: the name or address by which the others reach machine 0
rendezvous=EDIT-HOST-0:{{ port }}
{% endif %}
# edit: how to log in; add -i KEY, -l USER, -p PORT
ssh=(ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=30 -o ServerAliveCountMax=4)
# edit: the recipe's folder as the machines see it, ~/... in each one's home
folder={{ [folder] | shell }}
recipe={{ ['./' ~ job.file.name] | shell }}
# edit: what loads fulltune's environment on each machine: module load cuda, source /venv/bin/activate
read -r -d '' setup <<'SETUP'
export PATH="$PATH":{{ [programs] | shell }}
SETUP
# edit: the command; add --wait-for-machines 30m where the machines do not start at once
command=({{ job.command | shell }})
# edit: a local folder for their output
logs="${0%.sh}.logs"

if ((${#targets[@]} != {{ train.num_machines }})); then
    echo "${#targets[@]} hosts in targets=(...), expected {{ train.num_machines }} (train.num_machines); nothing was started" >&2
    exit 2
fi

# Run on each machine, with its folder, setup and command.
enter='
case "$1" in "~/"*) place="$HOME/${1#??}" ;; *) place="$1" ;; esac
cd "$place" 2>/dev/null || { echo "has no folder $1"; exit 2; }
[ -f "$2" ] || { echo "does not see $2 in $1; is this folder shared?"; exit 2; }
eval "$3"
command -v fulltune >/dev/null || { echo "has no fulltune on its PATH"; exit 2; }
'
# Signals arrive by name over the connection. If the connection ends, the run gets TERM to save.
work="$enter"'
shift 3
"$@" </dev/null &
child=$!
{ while read -r signal; do kill -s "$signal" "$child"; done; kill -s TERM "$child"; } <&0 2>/dev/null &
reader=$!
wait "$child"
code=$?
kill "$reader" 2>/dev/null
exit "$code"
'

on_machine() { # rank, words; replaces this shell, which would keep the others' connections open
    local line="exec" mark="'\\''" word
    for word in "${@:2}"; do line+=" '${word//\'/$mark}'"; done
    trap '' INT TERM HUP # this script passes them on
    exec "${ssh[@]}" -- "${targets[$1]}" "$line"
}

temporary="$(mktemp -d)" || exit 1
trap 'rm -rf "$temporary"' EXIT

# ---- before the start: check that each host answers and has fulltune and the recipe
pids=()
for rank in "${!targets[@]}"; do
    on_machine "$rank" bash -c "$enter" bash "$folder" "$recipe" "$setup" \
        </dev/null >"$temporary/$rank.out" 2>"$temporary/$rank.err" &
    pids+=($!)
done
refused=0
for rank in "${!targets[@]}"; do
    wait "${pids[$rank]}"
    code=$?
    if ((code == 255)); then
        echo "machine $rank, ${targets[$rank]}: does not answer: $(tail -n 1 "$temporary/$rank.err" | tr -d '\r')" >&2
        refused=1
    elif ((code != 0)); then
        echo "machine $rank, ${targets[$rank]}: $(cat "$temporary/$rank.out" "$temporary/$rank.err" | tail -n 1)" >&2
        refused=1
    fi
done
if ((refused)); then
    echo "nothing was started" >&2
    exit 2
fi

# ---- start
mkdir -p "$logs" || exit 1
pids=()
for rank in "${!targets[@]}"; do
    log="$logs/machine-$rank.log"
    words=("${command[@]}")
{% if train.num_machines > 1 %}
    words+=(--machine-rank "$rank" --rendezvous "$rendezvous")
{% endif %}
    words=(bash -c "$work" bash "$folder" "$recipe" "$setup" "${words[@]}")
    mkfifo "$temporary/$rank.in" || exit 1
    printf '\n==== %s, %s\n' "$(date)" "${targets[$rank]}" >>"$log"
    if ((rank == 0)); then
        on_machine 0 "${words[@]}" <"$temporary/0.in" > >(trap '' INT TERM HUP; exec tee -a "$log") 2>&1 &
    else
        on_machine "$rank" "${words[@]}" <"$temporary/$rank.in" >>"$log" 2>&1 &
    fi
    pids+=($!)
    # Kept open while this script runs, so that a machine notices when it ends.
    eval "exec $((10 + rank))>\"\$temporary/\$rank.in\""
done
told=0
stop() {
    local rank
    told=$((told + 1))
    if ((told == 1)); then echo "all machines are told to save and end" >&2; fi
    for rank in "${!targets[@]}"; do
        if kill -0 "${pids[$rank]}" 2>/dev/null; then echo TERM >&"$((10 + rank))"; fi
    done 2>/dev/null
}
trap stop INT TERM HUP
trap '' PIPE
echo "started on ${#targets[@]} machines; output in $logs/machine-RANK.log, that of machine 0 here" >&2

# ---- wait for all; if one fails, the others save and end
codes=()
left=${#targets[@]}
while ((left)); do
    sleep 0.5
    for rank in "${!targets[@]}"; do
        if [[ -n "${codes[$rank]-}" ]] || kill -0 "${pids[$rank]}" 2>/dev/null; then continue; fi
        wait "${pids[$rank]}"
        codes[rank]=$?
        left=$((left - 1))
        if ((codes[rank] != 0)); then
            echo "machine $rank, ${targets[$rank]}: ended with code ${codes[$rank]} ($logs/machine-$rank.log)" >&2
            if ((left && ! told)); then stop; fi
        fi
    done
done
sleep 0.2 # until the last of machine 0's output is written
exit "${codes[0]}"
