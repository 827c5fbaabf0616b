{{/*
The StatefulSet's spec of a trainer: what the chart runs itself, and what the control plane makes jobs from.
Arguments: root, trainer (values), labels (of the pod, as text), metrics (bool), page (bool), job (bool: the control plane sets name,
model, context length and certificate).
*/}}
{{- define "gradwire.trainerSpec" -}}
{{- $root := .root -}}
{{- $trainer := .trainer -}}
replicas: 1
serviceName: {{ if .job }}job{{ else }}{{ include "gradwire.fullname" $root }}-headless{{ end }}
persistentVolumeClaimRetentionPolicy: {whenDeleted: {{ if .job }}Delete{{ else }}Retain{{ end }}, whenScaled: Retain}
selector:
  matchLabels:
    {{- .labels | nindent 4 }}
template:
  metadata:
    labels:
      {{- .labels | nindent 6 }}
      {{- with $trainer.podLabels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- with $trainer.podAnnotations }}
    annotations:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  spec:
    serviceAccountName: {{ include "gradwire.fullname" $root }}-trainer
    automountServiceAccountToken: false
    enableServiceLinks: false
    terminationGracePeriodSeconds: {{ $trainer.terminationGracePeriodSeconds }}
    securityContext:
      {{- include "gradwire.podSecurity" $root | nindent 6 }}
    {{- with $root.Values.imagePullSecrets }}
    imagePullSecrets:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $trainer.priorityClassName }}
    priorityClassName: {{ . }}
    {{- end }}
    {{- with $trainer.runtimeClassName }}
    runtimeClassName: {{ . }}
    {{- end }}
    {{- with $trainer.nodeSelector }}
    nodeSelector:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $trainer.affinity }}
    affinity:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- if or $trainer.tolerations $trainer.gpu.count }}
    tolerations:
      {{- with $trainer.tolerations }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      {{- if $trainer.gpu.count }}
      - {key: {{ $trainer.gpu.resourceName }}, operator: Exists, effect: NoSchedule}
      {{- end }}
    {{- end }}
    containers:
      - name: trainer
        image: {{ include "gradwire.image" $root | quote }}
        imagePullPolicy: {{ $root.Values.image.pullPolicy }}
        securityContext:
          {{- include "gradwire.containerSecurity" $root | nindent 10 }}
        args:
          - serve
          - --listen=0.0.0.0:7777
          - --health-listen=0.0.0.0:7776
          {{- if not .job }}
          - {{ printf "--base-model=%s" $trainer.baseModel | quote }}
          {{- if $trainer.maxContextLength }}
          - --max-context-length={{ int $trainer.maxContextLength }}
          {{- end }}
          {{- end }}
          - --drain-timeout-s={{ int $trainer.drainSeconds }}
          - --log-json
          {{- if .metrics }}
          - --metrics-host=0.0.0.0
          - --metrics-port=9090
          {{- end }}
          {{- if .page }}
          - --page=0.0.0.0:8080
          {{- end }}
          {{- with $trainer.storage.url }}
          - {{ printf "--storage-url=%s" . | quote }}
          {{- end }}
          {{- include "gradwire.accessArgs" $root | nindent 10 }}
          {{- with $trainer.extraArgs }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        env:
          - {name: GRADWIRE_HOME, value: /data}
          - {name: HF_HOME, value: /data/huggingface}
          - {name: HOME, value: /tmp}
          {{- with $trainer.env }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        {{- if or $trainer.storage.secretName $trainer.envFrom }}
        envFrom:
          {{- with $trainer.storage.secretName }}
          - secretRef: {name: {{ . }}}
          {{- end }}
          {{- with $trainer.envFrom }}
          {{- toYaml . | nindent 10 }}
          {{- end }}
        {{- end }}
        ports:
          - {name: grpc, containerPort: 7777}
          - {name: health, containerPort: 7776}
          {{- if .metrics }}
          - {name: metrics, containerPort: 9090}
          {{- end }}
          {{- if .page }}
          - {name: page, containerPort: 8080}
          {{- end }}
        {{- include "gradwire.probes" (list $trainer.probes "gradwire.v1.TrainerService") | nindent 8 }}
        lifecycle:
          # SIGTERM drains; before it, proxies and clients learn that the pod is leaving.
          preStop: {exec: {command: [sleep, "5"]}}
        {{- $limits := deepCopy (default dict $trainer.resources.limits) }}
        {{- if $trainer.gpu.count }}
        {{- $_ := set $limits $trainer.gpu.resourceName (int $trainer.gpu.count) }}
        {{- end }}
        resources:
          {{- with $trainer.resources.requests }}
          requests:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          {{- with $limits }}
          limits:
            {{- toYaml . | nindent 12 }}
          {{- end }}
        volumeMounts:
          - {name: data, mountPath: /data}
          - {name: tmp, mountPath: /tmp}
          {{- if $trainer.sharedMemory }}
          - {name: shared-memory, mountPath: /dev/shm}
          {{- end }}
          {{- include "gradwire.accessMounts" $root | nindent 10 }}
    volumes:
      - {name: tmp, emptyDir: {}}
      {{- with $trainer.sharedMemory }}
      - {name: shared-memory, emptyDir: {medium: Memory, sizeLimit: {{ . }}}}
      {{- end }}
      {{- with $trainer.persistence.existingClaim }}
      - {name: data, persistentVolumeClaim: {claimName: {{ . }}}}
      {{- end }}
      {{- include "gradwire.accessVolumes" $root | nindent 6 }}
{{- if not $trainer.persistence.existingClaim }}
volumeClaimTemplates:
  - apiVersion: v1
    kind: PersistentVolumeClaim
    metadata:
      name: data
    spec:
      accessModes: [{{ $trainer.persistence.accessMode }}]
      {{- with $trainer.persistence.storageClass }}
      storageClassName: {{ . }}
      {{- end }}
      resources:
        requests:
          storage: {{ $trainer.persistence.size }}
{{- end }}
{{- end -}}
