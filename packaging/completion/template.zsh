#compdef @program@
# zsh completion for @program@. @generated@

#@guest
# The names of the VMRs in the launch directory, which the option, the environment, the settings' file or nobody names.
# Pure shell: Python takes a second to start in a slow VM.
@prefix@_names() {
    local launch=${given[--launch-dir]:-$VMR_AGENT_LAUNCH_DIR} config line each
    if [[ -z $launch ]]; then
        launch=@launch_dir@
        config=${given[--config]:-${VMR_AGENT_CONFIG:-@config@}}
        config=${config/#\~\//$HOME/}
        if [[ -f $config && -r $config ]]; then
            while IFS= read -r line || [[ -n $line ]]; do
                if [[ $line = (#b)launch_dir[[:blank:]]#=[[:blank:]]#(*[^[:blank:]])[[:blank:]]# ]]; then
                    launch=$match[1]
                fi
            done <$config
        fi
    fi
    launch=${launch/#\~\//$HOME/}
    for each in $launch/[-0-9]*/*(N/); do
        each=${each#$launch/}
        [[ $each = (-|)[0-9][-+.0-9e]#/* && $each != *[[:cntrl:]]* ]] && names+=($each)
    done
}
#@end
#@host
# The names of the VMs, or, given one, of its VMRs.
@prefix@_names() {
    local each
    local -a flags
    for each in --control --log-dir; do
        [[ -n $given[$each] ]] && flags+=("$each=${given[$each]/#\~\//$HOME/}")
    done
    names=(${(f)"$(_call_program names ${(q)${(Q)words[1]}} names ${(q)flags} -- ${(q)@} 2>/dev/null </dev/null)"})
}
#@end

@prefix@() {
    local -A values places given
    local -a verbs options need arguments kinds names found
    local verb plain option word key kind expl match mbegin mend cur=${(Q)PREFIX}
    @prefix@_tables
    for word in "${(@Q)words[2,CURRENT-1]}"; do
        key="$verb $word"
        if (($#need)); then
            shift need
            given+=("$option" "$word")
        elif [[ -z $plain && $word = -- ]]; then
            plain=1
        elif [[ -z $plain && $word = --*=* ]]; then
            given+=("${word%%=*}" "${word#*=}")
        elif [[ -z $plain && $word = -* && $word != -[0-9][^/]#/* ]]; then
            option=$word
            given+=("$word" '')
            need=(${=values[$key]})
        elif [[ -z $verb ]]; then
            verb=$word
        else
            arguments+=("$word")
        fi
#@host
        # The rest belongs to the program.
        [[ $verb = stage && ${+given[--at]} = 1 && $#arguments -ge 2 ]] && plain=1
#@end
    done
    @prefix@_tables  # again: which options there are depends on the verb

    # What may stand where the cursor is.
    kinds=(${=places[$verb]})
    if (($#need)); then
        kind=$need[1]
    elif [[ -z $plain && $cur = --*=* ]]; then
        key="$verb ${cur%%=*}"
        kind=${values[$key]%% *}
        compset -P '*='
        cur=${cur#*=}
    elif [[ -z $verb ]]; then
        if [[ $cur = -* ]]; then
            options=('--help:show help and exit' '--version:show the version and exit')
            _describe -o option options
        else
            _describe verb verbs
        fi
        return
    else
        kind=$kinds[$#arguments+1]
        [[ -z $kind && $kinds[-1] = *\* ]] && kind=$kinds[-1]
        if [[ -z $plain && ($cur = -* || -z $kind) ]]; then
            for word in "${options[@]}"; do
                key=${word%%:*}
                [[ $key = *\* || ${+given[$key]} = 0 ]] && found+=("${key%\*}:${word#*:}")
            done
            _describe -o option found
        fi
    fi
    kind=${kind%\*}
    if [[ $kind = source && $cur = *=* ]]; then
        compset -P '*='
        kind=file
    fi
    [[ $kind = vmr && $cur = [./~]* ]] && kind=directory
    case $kind in
        file) _files ;;
        directory) _files -/ ;;
#@guest
        vmr) @prefix@_names; _wanted vmrs expl VMR compadd -a names ;;
#@end
#@host
        vmr) @prefix@_names "$arguments[1]"; _wanted vmrs expl VMR compadd -a names ;;
        vm) @prefix@_names; _wanted vms expl VM compadd -a names ;;
#@end
        signal) _wanted signals expl signal compadd @signals@ ;;
        '='*) _wanted values expl value compadd ${(s:,:)kind#=} ;;
    esac
}

@prefix@_tables() {
@tables@
}

@prefix@ "$@"
