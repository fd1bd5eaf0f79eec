# bash completion for @program@. @generated@

#@guest
# The names of the VMRs in the launch directory, which the option, the environment, the settings' file or nobody names.
# Pure shell: Python takes a second to start in a slow VM.
@prefix@_names()
{
    local launch=${given[--launch-dir]-} config=${given[--config]-} line each
    [[ $launch ]] || launch=${VMR_AGENT_LAUNCH_DIR-}
    if [[ ! $launch ]]; then
        launch=@launch_dir@
        [[ $config ]] || config=${VMR_AGENT_CONFIG:-@config@}
        config=${config/#\~\//$HOME/}
        if [[ -f $config && -r $config ]]; then
            while IFS= read -r line || [[ $line ]]; do
                if [[ $line =~ ^launch_dir[[:blank:]]*=[[:blank:]]*(.*[^[:blank:]]) ]]; then
                    launch=${BASH_REMATCH[1]}
                fi
            done <"$config"
        fi
    fi
    launch=${launch/#\~\//$HOME/}
    while IFS= read -r -d '' each; do
        [[ $each =~ ^-?[0-9][-+.0-9e]*/ && $each != *[[:cntrl:]]* ]] && names+=("${each%/}")
    done < <(
        set +f
        shopt -u failglob dotglob
        shopt -s nullglob
        CDPATH='' builtin cd -- "$launch" 2>/dev/null || exit
        for each in [-0-9]*/*/; do printf '%s\0' "$each"; done
    )
}
#@end
#@host
# The names of the VMs, or, given one, of its VMRs.
@prefix@_names()
{
    local each flags=()
    for each in --control --log-dir; do
        [[ ${given[$each]-} ]] && flags+=("$each=${given[$each]/#\~\//$HOME/}")
    done
    while IFS= read -r each; do
        names+=("$each")
    done < <("${words[0]/#\~\//$HOME/}" names ${flags[@]+"${flags[@]}"} -- "$@" 2>/dev/null </dev/null)
}
#@end

@prefix@()
{
    local IFS=$' \t\n'
    local -A options values places
@tables@

    # The words before the cursor, as the command will get them: readline divides them at = and : too. What it will
    # replace is the part of the last one behind its character number `cut`.
    local words=() word='' quote='' started='' redirect='' cut=0 i char line=${COMP_LINE-}
    if [[ $line ]]; then line=${line:0:COMP_POINT}; else line="${COMP_WORDS[*]:0:COMP_CWORD + 1}"; fi
    for ((i = 0; i < ${#line}; i++)); do
        char=${line:i:1}
        if [[ $char == \\ && $quote != \' ]]; then
            word+=${line:i+1:1} started=1
            ((i += 1))
        elif [[ $quote ]]; then
            if [[ $char == "$quote" ]]; then quote=''; else word+=$char; fi
        elif [[ $char == [\'\"] ]]; then
            quote=$char started=1 cut=${#word}
        elif [[ $char == [[:blank:]\<\>] ]]; then
            [[ $char != [[:blank:]] && $word == [0-9\&] ]] && started=''
            [[ $started && ! $redirect ]] && words+=("$word")
            if [[ $char != [[:blank:]] ]]; then redirect=1; elif [[ $started ]]; then redirect=''; fi
            word='' started='' cut=0
        else
            word+=$char started=1
            [[ ${COMP_WORDBREAKS-} == *"$char"* ]] && cut=${#word}
        fi
    done
    local cur=$word

    local -A given=()
    local verb='' plain='' need=() option='' arguments=()
    for word in "${words[@]:1}"; do
        if ((${#need[@]})); then
            need=("${need[@]:1}") given[$option]=$word
        elif [[ ! $plain && $word == -- ]]; then
            plain=1
        elif [[ ! $plain && $word == --*=* ]]; then
            given[${word%%=*}]=${word#*=}
        elif [[ ! $plain && $word == -* && ! $word =~ ^-[0-9][^/]*/ ]]; then
            option=$word given[$word]='' need=(${values["$verb $word"]-})
        elif [[ ! $verb ]]; then
            verb=$word
        else
            arguments+=("$word")
        fi
#@host
        # The rest belongs to the program.
        [[ $verb == stage && ${given[--at]+given} && ${#arguments[@]} -ge 2 ]] && plain=1
#@end
    done

    # What may stand where the cursor is.
    local kind='' head='' kinds=(${places[${verb:--}]-}) found=() names=() each full
    if [[ $redirect ]]; then
        kind=file
    elif ((${#need[@]})); then
        kind=${need[0]}
    elif [[ ! $plain && $cur == --*=* ]]; then
        head=${cur%%=*}= cur=${cur#*=}
        kind=${values["$verb ${head%=}"]-}
        kind=${kind%% *}
    elif [[ ! $verb ]]; then
        found=($verbs)
        [[ $cur == -* ]] && found=(--help --version)
    else
        kind=${kinds[${#arguments[@]}]-}
        [[ ! $kind && "${kinds[*]}" == *\* ]] && kind=${kinds[${#kinds[@]} - 1]}
        if [[ ! $plain && ($cur == -* || ! $kind) ]]; then
            for each in ${options[${verb:--}]-}; do
                [[ $each == *\* || ! ${given[$each]+given} ]] && found+=("${each%\*}")
            done
        fi
    fi
    kind=${kind%\*}
    [[ $kind == source && $cur == *=* ]] && head+=${cur%%=*}= cur=${cur#*=} kind=file
    [[ $kind == vmr && $cur == [./~]* ]] && kind=directory
    COMPREPLY=()
    case $kind in
        file | directory)
            compopt -o filenames 2>/dev/null
            while IFS= read -r each; do
                full=$head$each
                COMPREPLY+=("${full:cut}")
            done < <(if [[ $kind == file ]]; then compgen -f -- "$cur"; else compgen -d -- "$cur"; fi)
            ;;
#@guest
        vmr) @prefix@_names ;;
#@end
#@host
        vmr) @prefix@_names "${arguments[0]}" ;;
        vm) @prefix@_names ;;
#@end
        signal) found+=(@signals@) ;;
        =*) found+=(${kind//[=,]/ }) ;;
    esac
    for each in "${found[@]}" "${names[@]}"; do
        full=$head$each
        [[ $full == "$head$cur"* ]] || continue
        each=${full:cut}
        # Within quotes nothing can be quoted, and a VM gives its VMRs names that a shell would act on.
        if [[ ! $quote ]]; then
            printf -v each %q "$each"
        elif [[ $each == *["$quote\$\`!\\"]* ]]; then
            continue
        fi
        COMPREPLY+=("$each")
    done
}

complete -F @prefix@ @program@
