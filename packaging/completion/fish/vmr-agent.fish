# fish completion for vmr-agent. Written by packaging/make_docs.py; change packaging/completion/template.fish instead.

function __vmr_agent_verbs
    printf '%s\t%s\n' run 'Be the daemon: watch, execute, ship.'
    printf '%s\t%s\n' rerun 'Run a VMR again in place, streaming its output.'
    printf '%s\t%s\n' status 'Show every VMR and what became of it.'
    printf '%s\t%s\n' logs 'Print what a VMR printed, byte for byte.'
    printf '%s\t%s\n' kill 'Signal a VMR\'s whole process tree.'
    printf '%s\t%s\n' ps 'Show a VMR\'s processes, and who holds its pipes.'
    printf '%s\t%s\n' diff 'Show what changed in a VMR\'s files since it was staged, or between two attempts.'
    printf '%s\t%s\n' check 'Look for what is wrong, and say what to do about it.'
    printf '%s\t%s\n' start 'Set time zero now: positive times count from here.'
    printf '%s\t%s\n' hold 'Let nothing new start by schedule.'
    printf '%s\t%s\n' resume 'End hold.'
    printf '%s\t%s\n' reset 'Forget all runs and the spool\'s id, before an image is baked.'
end

function __vmr_agent_options
    switch $argv[1]
        case run
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
        case rerun
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
            printf '%s\t%s\n' '--detach' 'start it and return at once'
            printf '%s\t%s\n' '--watch' 'run it again on each save in its directory'
            printf '%s\t%s\n' '--restart' 'with --watch: a save ends a run in progress'
        case status
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
            printf '%s\t%s\n' '--json' 'one array, one object a VMR; see below for its keys'
            printf '%s\t%s\n' '--watch' 'show it anew each second, until Ctrl-C'
        case logs
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
            printf '%s\t%s\n' '--attempt' 'default: the latest'
            printf '%s\t%s\n' '--stream' 'default: both, each to its own'
            printf '%s\t%s\n' '--timestamps' 'begin each line with its UTC time and its stream'
            printf '%s\t%s\n' '--follow' 'go on until the run\'s pipes are closed'
        case kill
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
            printf '%s\t%s\n' '--signal' 'name or number; default: TERM'
        case ps
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
        case diff
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
            printf '%s\t%s\n' '--attempt' 'compare these two attempts'
        case check
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
        case start
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
        case hold
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
        case resume
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
        case reset
            printf '%s\t%s\n' '--help' 'show help and exit'
            printf '%s\t%s\n' '--config' 'the settings\' file; default: /etc/vmr-agent.conf'
            printf '%s\t%s\n' '--launch-dir' 'where VMRs are staged; default: $VMR_AGENT_LAUNCH_DIR, else /var/launch'
            printf '%s\t%s\n' '--port' 'the virtio-serial port to the host: its name, a device\'s path or, to connect to a socket, unix:PATH; default: $VMR_AGENT_PORT, else org.vmr_agent.0'
            printf '%s\t%s\n' '--state-dir' 'runs, and output until the host has it; default: $VMR_AGENT_STATE_DIR, else /var/lib/vmr-agent'
            printf '%s\t%s\n' '--runtime-dir' 'sockets; default: $VMR_AGENT_RUNTIME_DIR, else /run/vmr-agent'
    end
end

function __vmr_agent_values
    switch $argv[1]
        case 'run --config'
            echo 'file'
        case 'run --launch-dir'
            echo 'directory'
        case 'run --port'
            echo 'file'
        case 'run --state-dir'
            echo 'directory'
        case 'run --runtime-dir'
            echo 'directory'
        case 'rerun --config'
            echo 'file'
        case 'rerun --launch-dir'
            echo 'directory'
        case 'rerun --port'
            echo 'file'
        case 'rerun --state-dir'
            echo 'directory'
        case 'rerun --runtime-dir'
            echo 'directory'
        case 'status --config'
            echo 'file'
        case 'status --launch-dir'
            echo 'directory'
        case 'status --port'
            echo 'file'
        case 'status --state-dir'
            echo 'directory'
        case 'status --runtime-dir'
            echo 'directory'
        case 'logs --config'
            echo 'file'
        case 'logs --launch-dir'
            echo 'directory'
        case 'logs --port'
            echo 'file'
        case 'logs --state-dir'
            echo 'directory'
        case 'logs --runtime-dir'
            echo 'directory'
        case 'logs --attempt'
            echo 'none'
        case 'logs --stream'
            echo '=stdout,stderr'
        case 'kill --config'
            echo 'file'
        case 'kill --launch-dir'
            echo 'directory'
        case 'kill --port'
            echo 'file'
        case 'kill --state-dir'
            echo 'directory'
        case 'kill --runtime-dir'
            echo 'directory'
        case 'kill --signal'
            echo 'signal'
        case 'ps --config'
            echo 'file'
        case 'ps --launch-dir'
            echo 'directory'
        case 'ps --port'
            echo 'file'
        case 'ps --state-dir'
            echo 'directory'
        case 'ps --runtime-dir'
            echo 'directory'
        case 'diff --config'
            echo 'file'
        case 'diff --launch-dir'
            echo 'directory'
        case 'diff --port'
            echo 'file'
        case 'diff --state-dir'
            echo 'directory'
        case 'diff --runtime-dir'
            echo 'directory'
        case 'diff --attempt'
            echo 'none'
            echo 'none'
        case 'check --config'
            echo 'file'
        case 'check --launch-dir'
            echo 'directory'
        case 'check --port'
            echo 'file'
        case 'check --state-dir'
            echo 'directory'
        case 'check --runtime-dir'
            echo 'directory'
        case 'start --config'
            echo 'file'
        case 'start --launch-dir'
            echo 'directory'
        case 'start --port'
            echo 'file'
        case 'start --state-dir'
            echo 'directory'
        case 'start --runtime-dir'
            echo 'directory'
        case 'hold --config'
            echo 'file'
        case 'hold --launch-dir'
            echo 'directory'
        case 'hold --port'
            echo 'file'
        case 'hold --state-dir'
            echo 'directory'
        case 'hold --runtime-dir'
            echo 'directory'
        case 'resume --config'
            echo 'file'
        case 'resume --launch-dir'
            echo 'directory'
        case 'resume --port'
            echo 'file'
        case 'resume --state-dir'
            echo 'directory'
        case 'resume --runtime-dir'
            echo 'directory'
        case 'reset --config'
            echo 'file'
        case 'reset --launch-dir'
            echo 'directory'
        case 'reset --port'
            echo 'file'
        case 'reset --state-dir'
            echo 'directory'
        case 'reset --runtime-dir'
            echo 'directory'
    end
end

function __vmr_agent_places
    switch $argv[1]
        case rerun
            echo 'vmr'
        case logs
            echo 'vmr'
        case kill
            echo 'vmr'
        case ps
            echo 'vmr'
        case diff
            echo 'vmr'
    end
end

# The names of the VMRs in the launch directory, which the option, the environment, the settings' file or nobody names.
# Pure shell: Python takes a second to start in a slow VM.
function __vmr_agent_names
    set -l launch (string replace -rf '^--launch-dir=' '' -- $argv '')[-1]
    set -l config (string replace -rf '^--config=' '' -- $argv '')[-1]
    test -n "$launch"; or set launch $VMR_AGENT_LAUNCH_DIR
    if test -z "$launch"
        set launch /var/launch
        test -n "$config"; or set config $VMR_AGENT_CONFIG
        test -n "$config"; or set config /etc/vmr-agent.conf
        set config (string replace -r '^~/' "$HOME/" -- $config)
        if test -f "$config" -a -r "$config"
            set -l found (string replace -rf '^launch_dir\s*=\s*(.*\S)\s*$' '$1' <$config)
            set -q found[1]; and set launch $found[-1]
        end
    end
    set launch (string replace -r '^~/' "$HOME/" -- $launch | string replace -r '/*$' '')
    for each in $launch/*/*/
        set -l name (string replace -- $launch/ '' $each | string collect)
        string match -rq '^-?[0-9][-+.0-9e]*/[^[:cntrl:]]*$' -- $name
        and string replace -r '/$' '' -- $name
    end
end

function __vmr_agent
    set -l words (commandline -opc)
    set -l cur (commandline -ct)
    set -l verb
    set -l plain
    set -l option
    set -l need
    set -l given
    set -l arguments
    for word in $words[2..]
        if set -q need[1]
            set -e need[1]
            set -a given "$option=$word"
        else if test -z "$plain"; and test "$word" = --
            set plain 1
        else if test -z "$plain"; and string match -q -- '--*=*' $word
            set -a given $word
        else if test -z "$plain"; and string match -q -- '-*' $word; and not string match -rq -- '^-[0-9][^/]*/' $word
            set option $word
            set -a given "$word="
            set need (__vmr_agent_values "$verb $word")
        else if test -z "$verb"
            set verb $word
        else
            set -a arguments $word
        end
    end

    # What may stand where the cursor is.
    set -l kind
    set -l head
    if set -q need[1]
        set kind $need[1]
    else if test -z "$plain"; and string match -q -- '--*=*' $cur
        set head (string replace -r '=.*' '=' -- $cur)
        set cur (string replace -r '^.*?=' '' -- $cur)
        set kind (__vmr_agent_values "$verb "(string replace = '' -- $head))[1]
    else if test -z "$verb"
        if string match -q -- '-*' $cur
            printf '%s\t%s\n' --help 'show help and exit' --version 'show the version and exit'
        else
            __vmr_agent_verbs
        end
        return
    else
        set -l kinds (__vmr_agent_places $verb)
        set kind $kinds[(math (count $arguments) + 1)]
        if test -z "$kind"; and string match -q -- '*\*' "$kinds[-1]"
            set kind $kinds[-1]
        end
        if test -z "$plain"; and begin; string match -q -- '-*' $cur; or test -z "$kind"; end
            for each in (__vmr_agent_options $verb)
                set -l flag (string split \t -- $each)[1]
                if string match -q -- '*\*' $flag; or not string match -q -- "$flag=*" $given ''
                    string replace '*' '' -- $each
                end
            end
        end
    end
    set kind (string replace '*' '' -- "$kind")
    if test "$kind" = source; and string match -q -- '*=*' $cur
        set head "$head"(string replace -r '=.*' '=' -- $cur)
        set cur (string replace -r '^.*?=' '' -- $cur)
        set kind file
    end
    if test "$kind" = vmr; and string match -rq -- '^[./~]' $cur
        set kind directory
    end
    switch "$kind"
        case file
            for each in (__fish_complete_path $cur)
                printf '%s%s\n' $head $each
            end
        case directory
            for each in (__fish_complete_directories $cur)
                printf '%s%s\n' $head $each
            end
        case vmr
            __vmr_agent_names $given
        case signal
            printf "$head%s\n" TERM KILL INT HUP QUIT USR1 USR2 STOP CONT ABRT
        case '=*'
            for each in (string split , -- (string sub -s 2 -- $kind))
                printf '%s%s\n' $head $each
            end
    end
end

complete -c vmr-agent -f -k -a '(__vmr_agent)'
